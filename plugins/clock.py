"""The clock of a run counts optimiser steps, not batches: a step may accumulate the gradients of micro-batches."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Feed(Protocol):
    """One pass over the training set; :meth:`Stepped.start_epoch` receives one.

    The pass yields the features of this process's share of the images, and each image exactly once: process r of W has
    the images r, r + W, … It does not depend on the sampler of the training, which may repeat or drop images.

    Args:
        view: "eval" for the evaluation view of each image, "train" for the large augmented views.
        mode: mode of the network, "eval" or "train".

    Yields:
        The positions of b images in the training set, ``[b]``, and their features, ``[b, F]`` for each view.
    """

    def __call__(self, *, view: str = "eval", mode: str = "eval") -> Iterator[tuple[Tensor, list[Tensor]]]: ...


class Stepped:
    """A component with a life cycle: its state depends on the run, and moves once per epoch or per optimiser step.

    A step may accumulate several micro-batches: all batches between ``before_step`` and ``after_step`` are its
    micro-batches. Otherwise each batch is a step. :class:`plugins.objective.Objective` calls the methods on its parts.
    """

    stepping: bool = False
    """Whether a step is open."""

    def attach(self, predictor: nn.Module | None, projector: nn.Module | None) -> None:
        """Receive the method's networks, once, for a loss that also applies them to rows of its own."""

    def allocate(self, size: int) -> None:
        """Allocate the memory of images. One that a checkpoint has filled is kept.

        Args:
            size: number of training images.

        Raises:
            ValueError: the checkpoint is that of another number of images.
        """

    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Start an epoch.

        Args:
            epoch: number of the epoch, from 0.
            feed: function that passes over the training set; None if the caller cannot offer one.

        Returns:
            The parameters that have been initialised anew, whose optimiser state must be dropped.
        """
        return ()

    def before_step(self) -> None:
        """Open a step. Does nothing while one is open."""
        self.stepping = True

    def after_step(self) -> None:
        """End the open step. Does nothing while none is open."""
        self.stepping = False

    def discard_step(self) -> None:
        """Forget the open step, of a run that was cut off within it, without communication between processes."""
        self.after_step()


class Clock(Stepped, nn.Module):
    """Count optimiser steps. A warm-up reads the count, and continues from it after a resume.

    Args:
        persistent: whether the count is in the state dict.

    Attributes:
        first: whether the last call was for the first micro-batch of its step.
        steps_per_epoch: number of optimiser steps in an epoch, set by the adapter; None if unknown.
        total: number of optimiser steps in the run, set by the adapter; None if unknown.
        epoch: number of the present epoch, from 0, set by ``start_epoch``; None if it has not been called.

    Buffers:
        steps: int64, ``[]``, number of steps that have begun.

    Example:
        >>> clock = Clock()
        >>> [int(clock()), int(clock())]
        [0, 1]
        >>> clock.before_step()
        >>> [int(clock()), int(clock())]  # two micro-batches of one step
        [2, 2]
    """

    steps: Tensor

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=persistent)
        self.steps_per_epoch: int | None = None
        self.total: int | None = None
        self.epoch: int | None = None
        self.first = True
        self._counted = False
        self._known: tuple[Tensor, int, int] | None = None  # the buffer, its version and its value

    @property
    def count(self) -> int:
        """Number of steps that have begun. It waits for the device only if not ``forward`` has changed it last."""
        if not self._knows():
            self._known = (self.steps, self.steps._version, int(self.steps))
        assert self._known is not None
        return self._known[2]

    def _knows(self) -> bool:
        return self._known is not None and self._known[0] is self.steps and self._known[1] == self.steps._version

    def forward(self) -> Tensor:
        """Return the number of earlier steps, ``[]``. The first call of a step in training mode counts the step."""
        if not self.training:
            return self.steps.clone()
        self.first = not self._counted
        before = self.steps - int(self._counted)
        if self.first:
            self._add_step()
        self._counted = self.stepping
        return before

    def earlier(self) -> int:
        """Count as a call does, and return the number of earlier steps as an int, without waiting for the device.

        >>> clock = Clock()
        >>> [clock.earlier(), clock.earlier(), clock.eval().earlier()]
        [0, 1, 2]
        """
        self()
        return self.count - int(self.training)

    def _add_step(self) -> None:
        if torch.compiler.is_compiling() or not self._knows():
            self.steps += 1
            return
        count = self.count
        self.steps += 1
        self._known = (self.steps, self.steps._version, count + 1)

    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Set the number of the epoch."""
        self.epoch = epoch
        return ()

    def epochs(self) -> int | None:
        """Return the number of complete epochs before the present step; None if it is unknown."""
        if self.epoch is not None:
            return self.epoch
        return None if not self.steps_per_epoch else max(self.count - 1, 0) // self.steps_per_epoch

    def after_step(self) -> None:
        """End the open step: the next call counts again."""
        super().after_step()
        self._counted = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.after_step()


class RowMeans:
    """Running means over the rows of all micro-batches of one step.

    Example:
        >>> means = RowMeans()
        >>> _ = means.add([torch.tensor(1.0)], torch.tensor(1.0))
        >>> means.add([torch.tensor(5.0)], torch.tensor(3.0))
        ([tensor(4.)], tensor(4.))
    """

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.rows: Tensor | None = None

    def add(self, means: list[Tensor], rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """Add the means of one more micro-batch.

        Args:
            means: the means over the rows of the micro-batch, in the same order at each call.
            rows: number of its rows, ``[]``, >= 0, of a floating dtype.

        Returns:
            The means over all rows so far, and the number of those rows.
        """
        if self.rows is None:
            self.means, self.rows = means, rows
        else:
            self.rows = self.rows + rows
            share = rows / self.rows.clamp(min=1)
            self.means = [so_far.lerp(mean, share.to(mean)) for so_far, mean in zip(self.means, means, strict=True)]
        return self.means, self.rows


class MovedByMeans(Stepped, nn.Module):
    """A component whose state moves once per step, by means over the rows of all micro-batches of the step.

    All micro-batches of a step see the same state. Without an open step each batch moves it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: RowMeans | None = None  # means over the open step

    def move(self, means: list[Tensor]) -> None:
        """Move the state by the means over the rows of a step."""
        raise NotImplementedError

    def observe(self, means: list[Tensor], rows: Tensor) -> None:
        """Add the means of a micro-batch, and move the state if no step is open; the arguments of ``RowMeans.add``."""
        self._seen = self._seen or RowMeans()
        self._seen.add(means, rows)
        if not self.stepping:
            self._move()

    def after_step(self) -> None:
        """End the open step: move the state by the rows of its micro-batches."""
        super().after_step()
        self._move()

    def discard_step(self) -> None:
        """Forget the open step and the rows of its micro-batches."""
        self._seen = None
        super().discard_step()

    @torch.no_grad()
    def _move(self) -> None:
        if self._seen is not None:
            self.move(self._seen.means)
            self._seen = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen = None
