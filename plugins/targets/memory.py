"""What every memory of the training images has: a buffer with a row for each image, sized late, in the state dict."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from plugins.checks import check_whole
from plugins.clock import Stepped


class ImageMemory(Stepped, nn.Module):
    """A buffer ``rows`` with one row for each image of the training set.

    It is empty until :meth:`allocate` is called or a checkpoint is loaded, because a framework may restore a model
    before it knows the number of training images. The images are its first axis: a framework recognises a memory that
    is not allocated by its first size.

    Args:
        empty: the buffer without images, ``[0, width]``, of the dtype of the rows.
    """

    HOLDS: ClassVar[str]
    """Start of an error message: what the memory holds of ``{size}`` images."""
    rows: Tensor

    def __init__(self, empty: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", empty)

    @property
    def size(self) -> int:
        """Number n of images; 0 before the allocation."""
        return self.rows.shape[0]

    def first_rows(self, size: int) -> Tensor:
        """Return the rows of a new memory, ``[n, width]``, on the CPU and the same on all processes.

        Args:
            size: number n of training images.
        """
        raise NotImplementedError

    @torch.no_grad()
    def allocate(self, size: int) -> None:
        """Fill an empty memory with its first rows. Does nothing if the memory already has this size.

        Args:
            size: number of training images, > 0.

        Raises:
            ValueError: the memory has another size, for example that of a checkpoint.
        """
        check_whole("size", size, low=1)
        if self.size == size:
            return
        if self.size:
            raise ValueError(
                f"{self.HOLDS.format(size=self.size)}, but the training set has {size}; "
                "continue with the training set of the checkpoint, or start a new run"
            )
        self.rows = self.first_rows(size).to(self.rows)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}rows")
        if not self.size and isinstance(saved, Tensor) and saved.shape[1:] == self.rows.shape[1:]:
            self.rows = self.rows.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
