"""Labels of all training images, made at the start of an epoch from a pass over the whole training set."""

import sys
import time
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from plugins.checks import check_whole
from plugins.clock import Feed
from plugins.distributed import LOCAL, Collective
from plugins.targets.memory import ImageMemory

IGNORED = -100
"""Label of an image without one, which losses leave out."""
SECONDS = 10.0
"""Time between two lines of the progress."""


class LabelTable(ImageMemory):
    """One label of each image of the training set in each of H clusterings. It is in the state dict.

    With no images it is empty until :meth:`allocate` is called or a checkpoint is loaded, because a framework may
    restore a model before it knows the number of training images. All processes have the same table.

    Args:
        clusterings: H ≥ 1.
        classes: K, for random first labels, about n / K of each; 0 starts without labels.
        seed: of the first labels.

    Buffers:
        rows: ``[n, H]``, int32, the labels of each image, -100 for one without a label.
        epoch: ``[]``, int64, the epoch in which labels were last made; -1 before. A run that is resumed within an epoch
            keeps the labels of this epoch.

    Raises:
        ValueError: an argument is out of range.

    >>> table = LabelTable(1, 2)
    >>> table.allocate(4)
    >>> table.read(torch.arange(4)).sum().item()  # two of each
    2
    """

    HOLDS = "the labels are those of {size} images"
    epoch: Tensor

    def __init__(self, clusterings: int, classes: int, *, seed: int = 0) -> None:
        check_whole("clusterings", clusterings, low=1)
        check_whole("classes", classes, low=0)
        super().__init__(torch.zeros(0, clusterings, dtype=torch.int32))
        self.classes, self.seed = classes, seed
        self.register_buffer("epoch", torch.tensor(-1))

    @property
    def labels(self) -> Tensor:
        """The labels of each clustering, ``[H, n]``: a view of the buffer."""
        return self.rows.T

    def first_rows(self, size: int) -> Tensor:
        """Return random labels, or none."""
        generator = torch.Generator().manual_seed(self.seed)
        columns = [
            torch.randperm(size, generator=generator) % self.classes if self.classes else torch.full((size,), IGNORED)
            for _ in self.labels
        ]
        return torch.stack(columns, 1)

    def read(self, index: Int64[Tensor, " B"] | None) -> Int64[Tensor, "H B"]:
        """Return the labels of some images.

        Args:
            index: of images, each in [0, n).

        Raises:
            ValueError: the table is empty, or the index is None or of another dtype.
        """
        if index is None or index.dtype != torch.int64:
            given = "None" if index is None else str(index.dtype)
            raise ValueError(f"index must be the positions of the images in the training set, int64 [B], got {given}")
        if not self.size:
            raise ValueError("there are no labels: call allocate with the number of training images first")
        return self.rows[index].T.long()

    def write(
        self, clustering: int, index: Int64[Tensor, " N"], labels: Int64[Tensor, " N"], comm: Collective = LOCAL
    ) -> None:
        """Replace the labels of a clustering. Images that no process names have none afterwards.

        Args:
            clustering: number of the clustering, in [0, H).
            index: of this process's images. No two processes have the same one.
            labels: their labels, ≥ 0.
            comm: the processes that share the images. They exchange n numbers.
        """
        found = self.rows.new_zeros(self.size)
        found[index] = (labels + 1).to(found.dtype)
        found = comm.sum(found) - 1
        self.rows[:, clustering] = found.masked_fill_(found < 0, IGNORED)


class Progress:
    """Print what a long computation does, on the first process, at most every ten seconds.

    Args:
        name: of the method.
        comm: the processes.

    >>> Progress("sela", LOCAL)("features", 1, 2)  # nothing: ten seconds have not passed
    """

    def __init__(self, name: str, comm: Collective) -> None:
        self.name, self.first, self.last = name, comm.rank == 0, time.monotonic()

    def __call__(self, what: str, done: int, total: int, error: float | None = None) -> None:
        """Report that ``done`` of ``total`` units are done, and an error or a score."""
        if self.first and time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            value = "" if error is None else f", {error:.3g}"
            print(f"{self.name}: {what} {done}/{total}{value}", file=sys.stderr, flush=True)

    def of(self, what: str, total: int) -> Callable[[int, float], None]:
        """Return a function of the number of iterations and an error, for the argument ``report``."""
        return lambda done, error: self(what, done, total, error)


@torch.no_grad()
def collect_features(
    feed: Feed, size: int, progress: Progress, comm: Collective, *, view: str = "eval", mode: str = "eval", half: bool
) -> tuple[Int64[Tensor, " N"], Float[Tensor, "N F"]]:
    """Pass over the training set once, and keep the features of this process's images.

    Args:
        feed: the pass. Of several views the first is used.
        size: number n of training images.
        progress: told after each batch.
        comm: the processes that share the pass.
        view, mode: as in :class:`plugins.clock.Feed`.
        half: whether to store the features in float16.

    Returns:
        The positions of the images in the training set, and their features: 4 or 2 bytes for each number, once.
    """
    rows, done = len(range(comm.rank, size, comm.size)), 0
    index, features = torch.empty(0), torch.empty(0)
    for places, (found, *_) in feed(view=view, mode=mode):
        if not done:
            index = torch.empty(rows, dtype=torch.int64, device=found.device)
            features = found.new_empty(rows, found.shape[1], dtype=torch.float16 if half else found.dtype)
        index[done : done + len(places)] = places
        features[done : done + len(places)] = found
        done += len(places)
        progress("features of images", min(done * comm.size, size), size)
    return index[:done], features[:done]


def check_clusters(option: str, count: int, images: int) -> None:
    """Require no more clusters than images, when the memory is allocated.

    Raises:
        ValueError: there are more clusters.
    """
    if count > images:
        raise ValueError(f"{option} must be at most the number of training images, {images}, got {count}; lower it")


def warn_without_pass(title: str, labels: str) -> None:
    """Warn that a method trains without the labels of a pass over the training set."""
    warnings.warn(
        f"{title} makes its labels from the whole training set, but has not seen it: it trains on {labels}; call "
        "start_epoch(epoch, dataloader, optimizer) at the start of each epoch",
        stacklevel=4,
    )
