"""Random draws of a method, the same on all processes and after a resume: they depend on a seed and a step only."""

import zlib

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor


def draw_seed(*numbers: int) -> int:
    """Return the seed of a draw that depends on some numbers only, such as the run's seed and the epoch.

    >>> draw_seed(0, 1) == draw_seed(0, 1) != draw_seed(1, 0)
    True
    """
    return zlib.crc32(" ".join(map(str, numbers)).encode())  # a generator uses 32 bits


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return a generator on the CPU whose numbers depend on the seed of a run and the step only.

    Args:
        seed: of the run.
        step: number of earlier optimiser steps.
    """
    # the generator uses 32 bits of its seed; a sum or product of both numbers would give two runs the same draws
    return torch.Generator().manual_seed(draw_seed(seed, step))


def device_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the generator of :func:`step_generator` on a device, for many numbers; they differ from a CPU's.

    Args:
        seed: of the run.
        step: number of earlier optimiser steps.
        device: type and index, the same type on all processes.
    """
    return torch.Generator(device).manual_seed(draw_seed(seed, step))


def unit_directions(
    count: int, width: int, generator: torch.Generator, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "M D"]:
    """Draw unit rows, uniformly on the sphere, on the device of the generator.

    Args:
        count: M ≥ 1.
        width: D ≥ 1.
        generator: of the draw.
        dtype: of the result.

    >>> bool(unit_directions(3, 2, step_generator(0, 0)).square().sum(1).allclose(torch.ones(3)))
    True
    """
    drawn = torch.randn(count, width, generator=generator, device=generator.device, dtype=dtype)
    return F.normalize(drawn, dim=1)


def distinct(size: int, count: int, generator: torch.Generator) -> Int64[Tensor, " K"]:
    """Draw distinct numbers from 0 … ``size`` - 1 in random order: each ordered sample has the same probability.

    The time and the memory grow with ``count``, not with ``size``: numbers are drawn with replacement, and repetitions
    are removed.

    Args:
        size: n ≥ 1.
        count: K ≥ 1; at most n numbers are drawn.
        generator: on the CPU.

    >>> distinct(3, 5, step_generator(0, 0)).sort().values
    tensor([0, 1, 2])
    """
    if 8 * count >= size:  # many repetitions
        return torch.randperm(size, generator=generator)[:count]
    drawn = torch.randint(size, (count + count // 8 + 8,), generator=generator)
    while len(found := _first_occurrences(drawn)) < count:
        drawn = torch.cat([drawn, torch.randint(size, (count // 8 + 8,), generator=generator)])
    return found[:count]


def _first_occurrences(values: Int64[Tensor, " M"]) -> Int64[Tensor, " K"]:
    """Remove repetitions, and keep the order. The first K of the result do not depend on the values after them."""
    found, order = values.sort(stable=True)
    first = torch.ones_like(found, dtype=torch.bool)
    first[1:] = found[1:] != found[:-1]
    return values[order[first].sort().values]
