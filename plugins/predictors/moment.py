"""The running second moment of a projection, which closed-form predictors and spectrum logging share."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_rows
from plugins.clock import RowMeans, Stepped
from plugins.distributed import LOCAL, Collective
from plugins.linalg import eigvalsh, joined_sums, squared_norm


class RunningMoment(Stepped, nn.Module):
    """Exponential moving average of the uncentred second moment of rows.

    ``C ← ρ C + (1 − ρ) Zᵀ Z / N``, where Z are the rows of all processes and C is initially 0. After k batches with the
    second moment S, C is ``(1 − ρ^k) S``.

    Between ``before_step`` and ``after_step``, Z are the rows of all micro-batches so far. After the last micro-batch C
    equals that of one batch with all rows. Call ``micro_batch`` at the start of each micro-batch: its v-th update
    replaces the v-th update of the previous one.

    Args:
        dim: width D of the rows.
        rho: ρ in [0, 1), decay of C per update (dimensionless). 0.998 averages over about 500 updates.
        center: also track the mean, so that ``covariance()`` is centred.
        comm: the processes that share the batch. C is identical on all of them; the numbers of rows may differ.

    Buffers:
        C: ``[D, D]``, symmetric up to rounding, in float32 (float64 after ``.double()``; ``.half()`` has no effect).
        steps: int64, number of updates, skipped batches included. The micro-batches of a step count once.
        mean ``[D]``, mass ``[]``: only with ``center``, the same moving average of the rows and of the constant 1.

    Example:
        >>> moment = RunningMoment(2, rho=0.5)
        >>> moment.update(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        >>> moment.C
        tensor([[1., 0.],
                [0., 0.]])
    """

    C: Tensor
    steps: Tensor
    mean: Tensor
    mass: Tensor

    def __init__(self, dim: int, rho: float = 0.998, *, center: bool = False, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("dim", dim, low=1)
        check_range("rho", rho, low=0.0, high=1.0 - torch.finfo(torch.float32).eps)
        self.dim, self.rho, self.center, self.comm = dim, rho, center, comm
        self.register_buffer("C", torch.zeros(dim, dim, dtype=torch.float32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        if center:
            self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
            self.register_buffer("mass", torch.zeros((), dtype=torch.float32))
        self._before: list[Tensor] = []  # the averages before the open step
        self._seen: list[RowMeans] = []  # means over the rows of the open step, one per update of a micro-batch
        self._place = 0  # index of the next update within its micro-batch

    def micro_batch(self) -> None:
        """Mark the start of a micro-batch. Only needed between ``before_step`` and ``after_step``."""
        self._place = 0

    def after_step(self) -> None:
        """End the open step. The next update starts from the present C."""
        super().after_step()
        self._before, self._seen, self._place = [], [], 0

    @torch.no_grad()
    def update(self, z: Float[Tensor, "B D"]) -> None:
        """Update the averages with one batch.

        The computation is in float32 with autocast off, because half precision loses the small eigenvalues of C. C
        does not change on any process if a process has inf or NaN in its rows, if there are no rows at all, or if the
        sum of squares overflows float32.

        Args:
            z: this process's rows of one or more views, of any floating dtype; not differentiated.

        Raises:
            ValueError: z is not a floating-point matrix with D columns.
        """
        self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.detach().to(self.C.dtype)
            # no entry of any product below exceeds the sum of all squares; this check does not synchronise
            usable = squared_norm(z) < torch.finfo(z.dtype).max / self.comm.size
            z = torch.where(usable, z, 0)
            parts = [z.T @ z, z.sum(0), z.new_full((), z.shape[0]), (~usable).to(z)]
            second, first, rows, bad = joined_sums(parts, self.comm)
            divisor = rows.clamp(min=1)
            self._average([second.div_(divisor), first / divisor], torch.where(bad == 0, rows, 0))

    def _average(self, means: list[Tensor], rows: Tensor) -> None:
        """Update the averages with means over rows; within a step, over these and all earlier rows of the step."""
        averages = [self.C, self.mean, self.mass] if self.center else [self.C]
        new = self._place == len(self._seen)
        if self.stepping:
            if self._place == 0 and new:
                self._before = [average.clone() for average in averages]
            elif self._place == 0:
                for average, before in zip(averages, self._before, strict=True):
                    average.copy_(before)
            if new:
                self._seen.append(RowMeans())
            means, rows = self._seen[self._place].add(means, rows)
            self._place += 1
        weight = (rows > 0).to(rows.dtype) * (1 - self.rho)
        # in place: DistributedDataParallel and compiled graphs keep references to the buffers
        self.C.lerp_(means[0], weight)
        if self.center:
            self.mean.lerp_(means[1], weight)
            self.mass.lerp_(torch.ones_like(self.mass), weight)
        if new:
            self.steps += 1

    def covariance(self) -> Float[Tensor, "D D"]:
        """Return C, or with ``center`` C − μμᵀ of the rows so far (scaled by 1 − ρ^k like C)."""
        if not self.center:
            return self.C
        return self.C - torch.outer(self.mean, self.mean) / self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny)

    @torch.no_grad()
    def spectrum(self) -> Float[Tensor, " D"]:
        """Compute the eigenvalues of ``covariance()``, largest first, ≥ 0. Call it only to log them."""
        return descending(eigvalsh(self.covariance()))

    def extra_repr(self) -> str:
        return f"{self.dim}, rho={self.rho}, center={self.center}"

    def _check(self, z: Tensor) -> None:
        check_rows(z=z)
        if z.shape[1] != self.dim:
            raise ValueError(f"z must have {self.dim} columns, got shape {tuple(z.shape)}")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.after_step()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningMoment":
        def no_less_than_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(no_less_than_float32, recurse)


def descending(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Reverse ascending eigenvalues of a positive semidefinite matrix; clamp negative rounding errors to 0."""
    return eigenvalues.clamp(min=0).flip(0)
