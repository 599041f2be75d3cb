"""One pass over the training set, in which each image occurs exactly once over all processes."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from plugins.checks import check_choice
from plugins.distributed import WORLD, Collective
from plugins.modes import in_mode
from plugins.tools.random_state import RandomState

VIEWS = ("eval", "train")


class _Views(Dataset):
    """The views of the images of a data set, with their positions in it."""

    def __init__(self, dataset: Any, views_of: Callable[[Any], Sequence[Tensor]]) -> None:
        self.dataset, self.views_of = dataset, views_of

    def __getitem__(self, index: int) -> tuple[int, list[Tensor]]:
        return index, [*self.views_of(self.dataset[index])]


class _Generators:
    """States of the global random generators, which a pass has of its own: of torch, numpy and Python.

    Args:
        seed: of all of them.
        device: whose generator is included.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        run = RandomState.now(device)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        self.state = RandomState.now(device)
        run.restore()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from these states within the block, and from those of the run after it."""
        run = RandomState.now(self.device)
        self.state.restore()
        try:
            yield
        finally:
            self.state = RandomState.now(self.device)
            run.restore()


class WholeSet:
    """The :class:`plugins.clock.Feed` that adapters hand to ``Objective.start_epoch``.

    Process r of W has the images r, r + W, … in batches of nearly equal sizes. All processes have the same number of
    batches, as synchronised batch norm needs. No image is repeated, unlike in a DistributedSampler, and none is
    dropped. The mode of the network is restored after the pass, also if it is not finished.

    All processes begin with the buffers of the first one, such as batch norm's running statistics, which are those of a
    checkpoint: DistributedDataParallel lets them differ between two forward passes of the training.

    Args:
        datasets: function for each kind of view, "eval" and "train", that returns the training set with the transform
            of that view; only called if the view is asked for.
        views_of: item of a data set → its views, ``[3, H, W]`` each.
        encode: views ``[b, 3, H, W]`` → features ``[b, F]`` of each; called without gradient.
        network: the modules behind ``encode``, whose mode the pass sets.
        batch_size: largest number of images of a batch, > 0.
        workers: number of processes that read images; 0 reads in this one.
        device: where the features are computed; None is the device of the network's first parameter.
        seed: of the augmentations and of what the network draws, such as the number of the epoch. The random numbers of
            the run are not used.
        comm: the processes that share the pass.

    Raises:
        ValueError: (when called) the view or the mode is unknown, or there are fewer images than processes.
    """

    def __init__(
        self,
        datasets: Mapping[str, Callable[[], Any]],
        views_of: Callable[[Any], Sequence[Tensor]],
        encode: Callable[[list[Tensor]], list[Tensor]],
        network: Sequence[nn.Module],
        *,
        batch_size: int,
        workers: int = 0,
        device: torch.device | None = None,
        seed: int = 0,
        comm: Collective = WORLD,
    ) -> None:
        self.datasets, self.views_of, self.encode, self.network = datasets, views_of, encode, [*network]
        self.batch_size, self.workers, self.device, self.comm = batch_size, workers, device, comm
        self.seed = seed

    def __call__(self, *, view: str = "eval", mode: str = "eval") -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Yield the positions of b images in the training set, ``[b]``, and the features ``[b, F]`` of each view."""
        check_choice("view", view, VIEWS)
        check_choice("mode", mode, VIEWS)
        dataset = self.datasets[view]()
        batches = shares(len(dataset), self.batch_size, self.comm.rank, self.comm.size)
        # the default generator would draw from that of the run
        seed = self.seed * self.comm.size + self.comm.rank
        generator = torch.Generator().manual_seed(seed)
        loader: Any = DataLoader(
            _Views(dataset, self.views_of),
            batch_sampler=batches,
            num_workers=self.workers,
            generator=generator,
        )
        device = self.device or next(p.device for part in self.network for p in part.parameters())
        reading, passing = _Generators(seed, device), _Generators(seed, device)
        share_buffers(self.network, self.comm)
        with in_mode(mode == "train", *self.network):
            batches = iter(loader)
            for _ in range(len(loader)):
                with reading.used():
                    index, views = next(batches)
                with passing.used(), torch.no_grad():
                    features = self.encode([images.to(device, non_blocking=True) for images in views])
                yield index.to(device), features


@torch.no_grad()
def share_buffers(modules: Sequence[nn.Module], comm: Collective) -> None:
    """Give the buffers of modules on each process the values of the first process."""
    if comm.size > 1:
        first = 0 if comm.group is None else dist.get_global_rank(comm.group, 0)
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            dist.broadcast(buffer, first, group=comm.group)


def shares(size: int, batch_size: int, rank: int, processes: int) -> list[list[int]]:
    """Return the batches of one process: its images, rank, rank + W, …, in batches of nearly equal sizes.

    Args:
        size: number n of images, at least W.
        batch_size: largest size of a batch, > 0. Batches of one image have two where the shares differ.
        rank: of this process.
        processes: W.

    Raises:
        ValueError: there are fewer images than processes.

    >>> shares(7, 2, 1, 2)
    [[1], [3, 5]]
    """
    if size < processes:
        raise ValueError(f"a pass over the training set needs an image for each of {processes} processes, got {size}")
    mine = range(rank, size, processes)
    count = min(math.ceil(math.ceil(size / processes) / batch_size), size // processes)
    bounds = [len(mine) * part // count for part in range(count + 1)]
    return [[*mine[start:end]] for start, end in pairwise(bounds)]
