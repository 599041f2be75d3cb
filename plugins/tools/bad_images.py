"""Data sets that go on when an image cannot be decoded, and a record of these images.

In training, :class:`Replacing` reads the next image of the data set that can be decoded, with its label. The
replacement does not depend on processes, workers or random numbers. In an evaluation, :class:`LeavingOut` and
:func:`decoded_batch` leave the image out. Other errors, such as a missing file or a file system that does not answer,
remain errors.
"""

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset, default_collate

from plugins.spelling import counted
from plugins.tools.command import UserError
from plugins.tools.files import atomic
from plugins.tools.images import ImageError

LIST = "bad_images.txt"
"""The file in a run's folder with the paths of the images that could not be decoded, one a line."""
_SHOWN = 3


class BadImages:
    """The images of a run that could not be decoded, in all its processes and their workers.

    Each process appends to a file of its own in the run's folder, since workers cannot return anything else to the
    training. :meth:`finish` joins these files.

    Args:
        folder: the run's folder. It may be set later, but before the first image is read.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._added: set[str] = set()

    def add(self, name: str) -> None:
        """Record the name of an image, once per process."""
        name = name.replace("\n", " ")
        if name in self._added or self.folder is None:
            return
        self._added.add(name)
        with (self.folder / f".{LIST}-{socket.gethostname()}-{os.getpid()}").open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")

    def names(self) -> list[str]:
        """Return the sorted names, without duplicates, also those before the run was interrupted."""
        if self.folder is None:
            return []
        files = [self.folder / LIST, *self._parts()]
        return sorted({name for file in files if file.is_file() for name in file.read_text("utf-8").splitlines()})

    def reset(self) -> None:
        """Delete the list of an earlier run in the folder. Call it in one process, before the first image is read."""
        if self.folder is not None:
            for file in (self.folder / LIST, *self._parts()):
                file.unlink(missing_ok=True)

    def finish(
        self, what: str = "could not be decoded: replaced by other images in training, left out of validation"
    ) -> int:
        """Write bad_images.txt, delete the files of the processes, and print the number of images.

        Call it in one process, after the others have read their last image.

        Args:
            what: what happened to these images, for the message.

        Returns:
            The number of images.
        """
        names = self.names()
        if self.folder is None or not names:
            print("all images could be decoded", flush=True)
            return 0
        with atomic(self.folder / LIST, "w", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in names))
        for part in self._parts():
            part.unlink(missing_ok=True)
        print(f"{counted(len(names), 'image')} {what}; list: {self.folder / LIST}", flush=True)
        return len(names)

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f".{LIST}-*")) if self.folder is not None else []


class _Recorded(Subset):
    """All images of a data set, and the record of those that cannot be decoded."""

    def __init__(self, dataset: Dataset, bad: BadImages) -> None:
        super().__init__(dataset, range(len(dataset)))  # pyright: ignore[reportArgumentType]
        self.bad = bad

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several items; the inherited method would not call ``__getitem__``."""
        return [self[index] for index in indices]


class Replacing(_Recorded):
    """A training set that replaces an image that cannot be decoded.

    Item i is the item of the first image among i, i + 1, … that can be decoded; after the last image comes the first.

    Args:
        dataset: a data set with a length, whose images are decoded by :mod:`plugins.tools.images`.
        bad: the record of the images.

    Raises:
        UserError: (when read) no image can be decoded.

    >>> class Images(Dataset):
    ...     def __len__(self):
    ...         return 3
    ...     def __getitem__(self, index):
    ...         if index == 2:
    ...             raise ImageError("2.png cannot be read as an image: it is empty")
    ...         return f"{index}.png"
    >>> [*map(Replacing(Images(), BadImages()).__getitem__, range(3))]
    ['0.png', '1.png', '0.png']
    """

    def __getitem__(self, index: Any) -> Any:
        """Return the item of the image, or of the next one that can be decoded."""
        size, first = len(self), None
        index = range(size)[index]  # an IndexError ends a loop over the data set
        for number in range(size):
            try:
                return self.dataset[(index + number) % size]
            except ImageError as error:
                self.bad.add(error.name)
                first = first or error
        raise UserError(f"none of the {size} images can be decoded: {first}")


class LeavingOut(_Recorded):
    """A data set for evaluation whose item is None if the image cannot be decoded; see :func:`decoded_batch`.

    Args:
        dataset: as for :class:`Replacing`.
        bad: the record of the images.
    """

    def __getitem__(self, index: Any) -> Any:
        """Return the item of the image, or None."""
        try:
            return self.dataset[index]
        except ImageError as error:
            self.bad.add(error.name)
            return None


def decoded_batch(items: Sequence[Any]) -> Any:
    """Join the items that are not None to a batch; a ``collate_fn`` of torch's DataLoader.

    Raises:
        UserError: all items are None.
    """
    found = [item for item in items if item is not None]
    if not found:
        raise UserError(
            f"none of the {counted(len(items), 'image')} of a batch of the evaluation can be decoded; "
            "use a larger batch size, or delete the files"
        )
    return default_collate(found)


def describe(names: Sequence[str]) -> str:
    """Return a sentence with the number of images that an evaluation has left out, and the names of some.

    >>> describe(["a.png", "b.png", "c.png", "d.png"])
    '4 images cannot be decoded and are left out: a.png, b.png, c.png, …'
    """
    shown = ", ".join([*names[:_SHOWN], *(["…"] if len(names) > _SHOWN else [])])
    verbs = ("cannot", "is") if len(names) == 1 else ("cannot", "are")
    return f"{counted(len(names), 'image')} {verbs[0]} be decoded and {verbs[1]} left out{': ' if names else ''}{shown}"
