"""Preconditions on tensors: the only place in this package where they raise.

Every message names what was expected and what was given, so that a user can act on it without a debugger.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_rows(**tensors: Tensor) -> None:
    """Require floating-point matrices ``[N, D]`` of one shape.

    Args:
        tensors: the matrices, named as the caller's parameters are.

    Raises:
        ValueError: one of them is not a floating-point matrix, or two shapes differ.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix [N, D], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )


def check_finite(what: str, **tensors: Tensor) -> None:
    """Require numbers without NaN and inf. It waits for the device: ask only where a solver has waited already.

    Args:
        what: the quantity that cannot be computed of others, for the error message.
        tensors: named as the caller's parameters are.

    Raises:
        ValueError: one of them, or more, holds NaN or inf.
    """
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(f"{what} needs finite numbers, got NaN or inf in {', '.join(broken)}")


def check_count(rows: int, *, least: int, what: str) -> None:
    """Require at least ``least`` rows over all processes.

    Raises:
        ValueError: there are fewer.
    """
    if rows < least:
        raise ValueError(f"{what} needs at least {least} rows over all processes, got {rows}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Require one of a few words.

    Raises:
        ValueError: ``value`` is none of ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_range(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    """Require ``low <= value <= high``, and a finite value.

    Raises:
        ValueError: it is outside, infinite, or not a number.
    """
    try:
        inside = low <= value <= high and value != math.inf
    except TypeError:
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not inside:
        end = ")" if math.isinf(high) else "]"
        raise ValueError(f"{name} must be in [{low:g}, {high:g}{end}, got {value!r}")


def check_whole(name: str, value: int, *, low: int) -> None:
    """Require an int of at least ``low``; a float, if it is whole too, and a flag are none.

    Raises:
        ValueError: it is of another type, or below.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    check_range(name, value, low=low)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a loss computes in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
