"""The states of the global random generators: of torch, NumPy, Python, and of one device."""

import random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState(NamedTuple):
    """The states at one moment.

    >>> state = RandomState.now(torch.device("cpu"))
    >>> drawn = torch.rand(2), random.random(), np.random.rand()
    >>> RandomState.from_plain(state.plain()).restore()
    >>> torch.equal(drawn[0], torch.rand(2)), drawn[1:] == (random.random(), np.random.rand())
    (True, True)
    """

    cpu: Tensor
    """Of torch."""
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    device: tuple[list[int], list[Tensor]]
    """Indexes and states; empty for the CPU."""

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """Return the present states.

        Args:
            device: whose generator is included.
        """
        numpy: Any = np.random.get_state()
        return cls(torch.get_rng_state(), random.getstate(), numpy, get_device_states(torch.empty(0, device=device)))

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.cpu)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        set_device_states(*self.device)

    def plain(self) -> list[Any]:
        """Return the states as types that ``torch.load`` reads with ``weights_only``."""
        version, internal, normal = self.python
        name, keys, *rest = self.numpy
        python = [version, torch.tensor(internal), normal]
        return [self.cpu, python, [name, torch.from_numpy(keys.astype(np.int64)), *rest], [*self.device]]

    @classmethod
    def from_plain(cls, states: list[Any]) -> "RandomState":
        """Return the states that ``plain`` has converted, from any device."""
        cpu, (version, internal, normal), (name, keys, *rest), (indexes, of_devices) = states
        python = (version, tuple(internal.tolist()), normal)
        numpy = (name, keys.numpy().astype(np.uint32), *rest)
        return cls(cpu.cpu(), python, numpy, (indexes, [state.cpu() for state in of_devices]))
