"""Check arguments. All preconditions on tensors raise here, and nowhere else in this package.

Every message names the expected and the given value, so that the user can correct the call.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


def check_rows(**tensors: Tensor) -> None:
    """Require floating-point matrices ``[N, D]`` of the same shape.

    Args:
        tensors: the matrices, named as the caller's parameters are.

    Raises:
        ValueError: a tensor is not a floating-point matrix, or two shapes differ.
    """
    if not tensors:
        raise ValueError("at least one matrix is needed, got none")
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be one matrix [N, D], got a {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must be a matrix [N, D], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )


def check_views(**views: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
    """Require lists of views, each a matrix ``[N, D]``, all of the same shape. How many is not checked.

    Args:
        views: lists of matrices, or tensors ``[V, N, D]``, named as the caller's parameters are.

    Returns:
        The matrices, with names such as ``student[0]``.

    Raises:
        ValueError: a tensor ``[N, D]`` in place of a list, or what :func:`check_rows` does not accept.
    """
    for name, given in views.items():
        if isinstance(given, Tensor) and given.ndim < 3:
            raise ValueError(
                f"{name} is one tensor of shape {tuple(given.shape)}; "
                f"pass a list of views, such as [{name[0]}0, {name[0]}1]"
            )
    rows = {f"{name}[{v}]": view for name, given in views.items() for v, view in enumerate(given)}
    if rows:
        check_rows(**rows)
    return rows


class NotFiniteError(ValueError, FloatingPointError):
    """NaN or inf where finite numbers are needed. Training loops handle it as a FloatingPointError."""


def not_finite(what: str, where: str) -> NotFiniteError:
    """Make the error of a quantity that cannot be computed.

    Args:
        what: the quantity.
        where: names of the tensors that hold NaN or inf.
    """
    return NotFiniteError(
        f"{what} needs finite numbers, got NaN or inf in {where}; "
        "lower the learning rate if the loss grew from step to step, else check the input for NaN"
    )


def check_finite(what: str, **tensors: Tensor) -> None:
    """Require finite tensors. This synchronises with the device: call it only where a solver has already done so.

    Args:
        what: the quantity that is computed from them, for the error message.
        tensors: the tensors, named as the caller's parameters are.

    Raises:
        NotFiniteError: at least one tensor holds NaN or inf.
    """
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise not_finite(what, ", ".join(broken))


class _Sums(Protocol):
    """The part of :class:`plugins.distributed.Collective` that a check needs."""

    def sum(self, tensor: Tensor) -> Tensor: ...


def check_result(what: str, result: Tensor, comm: _Sums, **tensors: Tensor) -> None:
    """If a result is NaN or inf, name the tensors that caused it. Call it after the computation, on all processes.

    The check costs one comparison, as the tensors are read only after a failure. It does nothing on a GPU, where it
    would wait for the device, and in compiled or traced code: there the result shows the fault.

    Args:
        what: the quantity that was computed, for the error message.
        result: scalar, the same on all processes.
        comm: the processes that share the batch. After a failure they exchange which tensors are not finite, so that
            every process names the same ones.
        tensors: this process's tensors, named as the caller's parameters are, in the same order on all processes.

    Raises:
        NotFiniteError: a tensor of some process holds NaN or inf. If all are finite, the result has overflowed, which
            is no error here.
    """
    if torch.compiler.is_compiling() or result.device.type != "cpu":
        return
    try:
        if bool(result.isfinite()):
            return
    except RuntimeError:  # a traced tensor has no value
        return
    broken = torch.tensor([not bool(tensor.isfinite().all()) for tensor in tensors.values()], dtype=torch.float32)
    counts = comm.sum(broken)
    names = [name for name, count in zip(tensors, counts.tolist(), strict=True) if count]
    if names:
        where = "" if bool(broken.any()) else " of another process"
        raise not_finite(what, ", ".join(names) + where)


def check_count(rows: int, *, least: int, what: str) -> None:
    """Require at least ``least`` rows over all processes.

    Raises:
        ValueError: there are fewer.
    """
    if rows < least:
        raise ValueError(f"{what} needs at least {least} rows over all processes, got {rows}")


def check_indices(name: str, index: Tensor, size: int) -> None:
    """Require distinct positions ``[K]`` in a sequence, K ≥ 1. Values are read on the CPU only, not in compiled code.

    Args:
        name: the caller's name of the argument.
        index: int64.
        size: length of the sequence.

    Raises:
        ValueError: the dtype or shape is another, or an index is outside [0, size) or given twice.
    """
    if index.dtype != torch.int64 or index.ndim != 1 or len(index) == 0:
        raise ValueError(f"{name} must be int64 indices [K], K >= 1, got {index.dtype} of shape {tuple(index.shape)}")
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if bool((index < 0).any()) or bool((index >= size).any()) or len(index.unique()) < len(index):
        raise ValueError(f"{name} must be distinct indices from 0 to {size - 1}, got {index.tolist()}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Require one of the allowed strings.

    Raises:
        ValueError: ``value`` is not in ``allowed``.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_range(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    """Require a finite value with ``low <= value <= high``.

    Raises:
        ValueError: the value is outside the range, infinite, or not a number.
    """
    try:
        inside = low <= value <= high and value != math.inf
    except TypeError:
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not inside:
        end = ")" if math.isinf(high) else "]"
        raise ValueError(f"{name} must be in [{low:g}, {high:g}{end}, got {value!r}")


def check_whole(name: str, value: int, *, low: int) -> None:
    """Require an int of at least ``low``. Floats (also whole ones) and bools are not accepted.

    Raises:
        ValueError: the value has another type or is below ``low``.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    check_range(name, value, low=low)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a loss computes: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
