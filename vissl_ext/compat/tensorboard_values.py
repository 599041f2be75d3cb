"""Scalars of TensorBoard.

vissl/hooks/tensorboard_hook.py:264 rounds the learning rate to five digits, which makes small ones 0, and fails if the
parameter groups have several. Line 179 fails for a meter whose value is a tensor of several numbers.
"""

from typing import Any

import torch


def activate() -> None:
    """Replace ``round`` in VISSL's module."""
    from vissl.hooks import tensorboard_hook

    tensorboard_hook.round = scalar


def scalar(value: Any, digits: int = 0) -> float:
    """Return a number: the largest of several learning rates, the mean of a tensor.

    Args:
        value: a number, a list or set of numbers, or a tensor.
        digits: ignored, as TensorBoard rounds what it shows.
    """
    if isinstance(value, torch.Tensor):
        return float(value.float().mean())
    return float(max(value) if isinstance(value, list | set | tuple) else value)
