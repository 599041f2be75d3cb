"""Data sets for methods that remember each image, or that pass over the training set at the start of an epoch.

::

    images = LightlyDataset("train", transform=IsoLossTransform())
    dataset = IndexedDataset(images)
    model = SomeIndexedMethod(backbone, num_samples=len(dataset))
    for views, labels, index in DataLoader(dataset, batch_size=256, shuffle=True):
        loss = model.loss(views, index)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from plugins.distributed import Collective
from plugins.spec import large_views
from plugins.tools.feed import WholeSet

BATCH_SIZE = 256
"""Images per batch of a pass over the training set, if the data loader does not say how many."""


class IndexedDataset(Dataset):
    """A data set whose items are ``(views, label, index)``: the position of the image in place of its file name.

    The items of the given data set are ``(views, label, …)``, as those of LightlyDataset and of torchvision, or the
    views alone, which get the label 0. To train on a part of a data set, wrap the part:
    ``IndexedDataset(Subset(images, chosen))``.

    Args:
        dataset: the training set, with the augmentations.
        evaluation: the same images in the same order with the transform of the evaluation, for methods that compute
            features of the images without augmentation. Only such methods need it.

    Raises:
        ValueError: the two data sets differ in length, or (when read) an item is neither a tuple nor views.

    >>> dataset = IndexedDataset([([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)], 5, "a.png")])
    >>> views, label, index = dataset[0]
    >>> len(views), label, index
    (2, 5, 0)
    """

    def __init__(self, dataset: Any, evaluation: Any = None) -> None:
        if evaluation is not None and len(evaluation) != len(dataset):
            raise ValueError(
                "evaluation must have the images of the training set in the same order, "
                f"got {len(evaluation)} images for {len(dataset)}"
            )
        self.dataset, self.evaluation = dataset, evaluation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        index = range(len(self))[index]
        views, label = _views_and_label(self.dataset[index])
        return views, label, index


def _views_and_label(item: Any) -> tuple[Any, Any]:
    if isinstance(item, tuple):
        return item[0], item[1] if len(item) > 1 else 0
    if isinstance(item, dict):
        raise ValueError(f"an item must be (views, label, …) or views, got a dict of {', '.join(map(str, item))}")
    return item, 0


def positions(index: Any, rows: int, size: int | None, device: torch.device | None = None) -> Tensor:
    """Check the positions of the images of a batch.

    Args:
        index: integers, ``[B]``: a tensor or a list.
        rows: B.
        size: number of training images; None if it is unknown.
        device: of the result.

    Returns:
        int64, ``[B]``.

    Raises:
        ValueError: they are no integers, not one for each image, or (if they are on the CPU) beyond the training set.
    """
    try:
        found = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.shape != (rows,) or found.dtype not in (torch.int64, torch.int32):
        given = f"a {type(index).__name__}" if found is None else f"{found.dtype} of shape {tuple(found.shape)}"
        raise ValueError(
            f"index must be the position of each image in the training set, {rows} integers, got {given}; "
            "wrap the data set in lightly_ext.data.IndexedDataset, whose third element it is"
        )
    if size is not None and rows and found.device.type == "cpu":
        least, most = int(found.min()), int(found.max())
        if least < 0 or most >= size:
            raise ValueError(
                f"index must be in [0, {size}) for {size} training images, got {least} to {most}; "
                "wrap the data set that the loader reads, also if it is a part of another one"
            )
    return found.to(device, torch.int64)


def count(loader: Any) -> int | None:
    """Return the number of images that a data loader reads; None if it reads batches, a stream, or is no DataLoader."""
    if getattr(loader, "batch_sampler", None) is None or isinstance(loader.dataset, IterableDataset):
        return None
    return len(loader.dataset)


def whole_set(
    loader: DataLoader,
    encode: Callable[[list[Tensor]], list[Tensor]],
    network: Sequence[nn.Module],
    comm: Collective,
    seed: int,
) -> WholeSet:
    """Make the pass over the training set of a data loader, which reads each image once, whatever the sampler does.

    Args:
        loader: of the training; its data set, batch size and number of workers are used.
        encode: views → features of each.
        network: the modules behind ``encode``.
        comm: the processes that share the pass.
        seed: of the augmentations that the loader's workers draw.

    Returns:
        A feed of :meth:`plugins.objective.Objective.start_epoch`. Its view "train" is the large views of the
        augmentations, "eval" is the ``evaluation`` of an IndexedDataset.

    Raises:
        ValueError: (when called) the loader reads batches or a stream, or there are no evaluation images.
    """

    def training() -> Any:
        if count(loader) is None:
            raise ValueError(
                "a pass over the training set needs a data loader that reads images by their positions, got one with "
                f"{'a stream' if isinstance(loader.dataset, IterableDataset) else 'batch_size=None'}"
            )
        return loader.dataset

    def evaluation() -> Any:
        if getattr(training(), "evaluation", None) is None:
            raise ValueError(
                "the method computes features of the training images without augmentation; give them: "
                "lightly_ext.data.IndexedDataset(dataset, evaluation=<the same images with the transform of the "
                "evaluation>)"
            )
        return loader.dataset.evaluation

    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", BATCH_SIZE)
    return WholeSet(
        {"train": training, "eval": evaluation},
        _large_views,
        encode,
        network,
        batch_size=batch_size,
        workers=loader.num_workers,
        seed=seed,
        comm=comm,
    )


def _large_views(item: Any) -> list[Tensor]:
    """Return the large views of an item of a data set."""
    views, _ = _views_and_label(item)
    views = [views] if isinstance(views, Tensor) else [*views]
    if not all(isinstance(view, Tensor) for view in views):
        raise ValueError(
            "a pass over the training set needs a data set whose items are tensors, got "
            f"{', '.join(type(view).__name__ for view in views)}; let its transform make them, not a collate function"
        )
    whole = [view for view in views if view.ndim != 4]  # the others are stacks of patches
    return whole[: large_views([tuple((1, *view.shape)[-2:]) for view in whole])]
