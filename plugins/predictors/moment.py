"""The running second moment of a projection, which closed-form predictors and spectrum logging share."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_rows
from plugins.distributed import LOCAL, Collective
from plugins.linalg import eigvalsh, squared_norm


class RunningMoment(nn.Module):
    """Exponential moving average of the uncentred second moment of the rows it is shown.

    ``C ← ρ C + (1 − ρ) Zᵀ Z / N`` with Z the joined rows of all processes, ``C = 0`` at first: after k batches of
    second moment S it holds ``(1 − ρ^k) S``.

    Args:
        dim: width D of the rows.
        rho: ρ in [0, 1), what is kept of C at each update (dimensionless). 0.998 remembers about 500 updates.
        center: also follow the mean, so that ``covariance()`` is centred.
        comm: the processes whose rows are joined. C is the same on all of them; numbers of rows may differ.

    Buffers:
        C: ``[D, D]``, symmetric up to rounding, in float32 (float64 after ``.double()``; ``.half()`` changes nothing).
        steps: int64, calls of ``update``, the skipped ones included.
        mean ``[D]``, mass ``[]``: with ``center`` only, the same moving average of the rows and of the constant 1.

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

    @torch.no_grad()
    def update(self, z: Float[Tensor, "B D"]) -> None:
        """Take one batch into account.

        Computed in float32 with autocast off: in half precision the small eigenvalues of C drown in rounding. A batch
        that holds an inf or a NaN, or no rows at all, on whichever process, leaves C as it is on every process; so does
        one whose squares add up to more than float32 can hold.

        Args:
            z: this process's rows of one or more views, of any floating dtype; not differentiated.

        Raises:
            ValueError: z is no floating-point matrix of D columns.
        """
        self._check(z)
        with torch.autocast(z.device.type, enabled=False):
            z = z.detach().to(self.C.dtype)
            # no entry of any product below exceeds the sum of all squares; nothing here waits for the device
            usable = squared_norm(z) < torch.finfo(z.dtype).max / self.comm.size
            z = torch.where(usable, z, 0)
            second, first, rows, bad = self._joined([z.T @ z, z.sum(0), z.new_full((), z.shape[0]), (~usable).to(z)])
            weight = ((bad == 0) & (rows > 0)).to(z.dtype) * (1 - self.rho)
            rows = rows.clamp(min=1)
            # in place: DistributedDataParallel and compiled graphs hold on to the buffer itself
            self.C.lerp_(second.div_(rows), weight)
            if self.center:
                self.mean.lerp_(first / rows, weight)
                self.mass.lerp_(torch.ones_like(self.mass), weight)
        self.steps += 1

    def _joined(self, parts: list[Tensor]) -> list[Tensor]:
        """Sums over the processes, by one collective for all."""
        if self.comm.size == 1:
            return parts
        total = self.comm.sum(torch.cat([part.flatten() for part in parts]))
        sums = total.split([part.numel() for part in parts])
        return [summed.view_as(part) for summed, part in zip(sums, parts, strict=True)]

    def covariance(self) -> Float[Tensor, "D D"]:
        """C, or with ``center`` C − μμᵀ of the rows seen so far (scaled by 1 − ρ^k, as C is)."""
        if not self.center:
            return self.C
        return self.C - torch.outer(self.mean, self.mean) / self.mass.clamp(min=torch.finfo(self.mass.dtype).tiny)

    @torch.no_grad()
    def spectrum(self) -> Float[Tensor, " D"]:
        """Eigenvalues of ``covariance()``, largest first, ≥ 0, computed now: ask for it only when you log it."""
        return descending(eigvalsh(self.covariance()))

    def extra_repr(self) -> str:
        return f"{self.dim}, rho={self.rho}, center={self.center}"

    def _check(self, z: Tensor) -> None:
        check_rows(z=z)
        if z.shape[1] != self.dim:
            raise ValueError(f"z must have {self.dim} columns, got shape {tuple(z.shape)}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningMoment":
        def no_less_than_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(no_less_than_float32, recurse)


def descending(eigenvalues: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """Ascending eigenvalues of a positive semidefinite matrix, turned round and freed of negative rounding errors."""
    return eigenvalues.clamp(min=0).flip(0)
