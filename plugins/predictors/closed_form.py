"""The closed-form predictor: a power of the running second moment of the projections, computed instead of learned.

DirectPred (2102.06810, Eq. 18 and 19), DirectCopy (2110.04947, Eq. 3) and, with the same W, IsoLoss and IsoCopy
(2212.04858, Section 3). The variant is that of 2212.04858: the spectrum is divided by its largest value and ε is added
inside the power. DirectCopy as first published, W = C + εI, is ``alpha=1, normalize=False``.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from plugins.checks import check_choice, check_range, compute_dtype
from plugins.distributed import LOCAL, Collective
from plugins.linalg import eigh, eigvalsh
from plugins.predictors.moment import RunningMoment, descending


class ClosedFormPredictor(RunningMoment):
    """``p = z W`` with ``W = (C / λmax + ε I)^α`` and C the running second moment of z.

    W is symmetric and has no gradient. With ``normalize=True`` its eigenvalues are in [ε^α, (1 + ε)^α], and it does not
    depend on the scale of z. With ``normalize=False`` it is ``(C + ε I)^α``. With α = 1 no eigenvectors are computed,
    and W is exact also for rank-deficient and nearly isotropic C.

    If C is zero (before the first update, or if all z were zero), the spectrum is treated as isotropic:
    W = (1 + ε)^α I, or ε^α I with ``normalize=False``. The prediction is therefore always finite.

    Args:
        dim: width D of the projection.
        alpha: α ≥ 0, the power: ½ is DirectPred and IsoLoss, 1 is DirectCopy and IsoCopy.
        eps: ε ≥ 0, added to the spectrum before the power, in units of λmax (of C itself with ``normalize=False``).
        rho: ρ in [0, 1), decay of C **per update**. ``"sequential"`` makes one update per view, so that a step with two
            views retains ρ² of C. ``"pooled"`` makes one update per step; pass ρ² for the same decay.
        normalize: divide the spectrum by λmax. Use False with the Euclidean metric, because normalised W has no scale.
        mode: ``"sequential"``: each view in turn updates C and is predicted with the new W, so that W differs between
            views and their order matters. ``"pooled"``: one update with all views, and one W for all of them.
        every: k ≥ 1, compute W at the first and then at every k-th update; C is updated every time. k = 10 changes W by
            about 2e-3 at ρ = 0.998; use 1 at ρ = 0.5. The micro-batches of an optimiser step count as one update.
        center: use the centred second moment.
        comm: the processes that share the batch.

    Buffers:
        C, steps: as in RunningMoment.
        W: ``[D, D]``, in the state dict, so that a resumed run continues bit for bit, also with ``every`` > 1.
        eigenvalues: ``[D]``, spectrum of (centred) C when W was last computed, largest first, for logging.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> predictor = ClosedFormPredictor(2, alpha=0.5)
        >>> predictor.predict([torch.tensor([[2.0, 0.0], [0.0, 1.0]])])
        [tensor([[2.0000, 0.0000],
                [0.0000, 0.5000]])]
    """

    W: Tensor
    eigenvalues: Tensor

    def __init__(
        self,
        dim: int,
        *,
        alpha: float = 0.5,
        eps: float = 0.0,
        rho: float = 0.998,
        normalize: bool = True,
        mode: Literal["sequential", "pooled"] = "sequential",
        every: int = 1,
        center: bool = False,
        comm: Collective = LOCAL,
    ) -> None:
        super().__init__(dim, rho, center=center, comm=comm)
        check_range("alpha", alpha, low=0.0)
        check_range("eps", eps, low=0.0)
        check_range("every", every, low=1)
        check_choice("mode", mode, ("sequential", "pooled"))
        self.alpha, self.eps, self.normalize, self.mode, self.every = alpha, eps, normalize, mode, every
        isotropic = (float(normalize) + eps) ** alpha
        self.register_buffer("W", isotropic * torch.eye(dim, dtype=torch.float32))
        self.register_buffer("eigenvalues", torch.zeros(dim, dtype=torch.float32))
        self._phase = 0  # steps modulo every, known without synchronisation; constant for every=1, so it compiles once

    @torch.no_grad()
    def update(self, z: Float[Tensor, "B D"]) -> None:
        """Update C with one batch, and recompute W at every k-th call.

        Args:
            z: rows of this process; detached. A batch with inf or NaN changes neither C nor W.

        Raises:
            ValueError: z is not a floating-point matrix with D columns.
        """
        again = len(self._seen) - self._place  # > 0: an earlier micro-batch of this step has already made this update
        due = (self._phase - again) % self.every == 0
        super().update(z)
        if not again:
            self._phase = (self._phase + 1) % self.every
        if due:
            with torch.autocast(z.device.type, enabled=False):
                self._refresh()

    def forward(self, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Return ``z W`` with the W of the last update, in float32 (float64 for float64 input). Only z gets a gradient.

        Raises:
            ValueError: z is not a floating-point matrix with D columns.
        """
        self._check(z)
        dtype = compute_dtype(z.dtype)
        with torch.autocast(z.device.type, enabled=False):
            # a copy: autograd stores it for backward, while the update of the next view overwrites the buffer
            return z.to(dtype) @ self.W.to(dtype, copy=True)

    def predict(self, views: list[Float[Tensor, "_ D"]]) -> list[Float[Tensor, "_ D"]]:
        """Return the predictions of all views of one step. C and W are updated in training mode only.

        Args:
            views: one matrix per view. The numbers of rows may differ between views and processes.
        """
        self.micro_batch()
        if self.training and self.mode == "pooled":
            self.update(torch.cat([z.detach() for z in views]))
        predictions = []
        for z in views:
            if self.training and self.mode == "sequential":
                self.update(z)
            predictions.append(self(z))
        return predictions

    def extra_repr(self) -> str:
        options = (
            f"alpha={self.alpha}, eps={self.eps}, normalize={self.normalize}, mode={self.mode}, every={self.every}"
        )
        return f"{super().extra_repr()}, {options}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._phase = int(self.steps) % self.every

    def _refresh(self) -> None:
        moment = self.covariance()
        if self.alpha == 1:
            values, vectors = eigvalsh(moment), None
        else:
            values, vectors = eigh(moment)
        values = values.clamp(min=0)
        largest = values[-1] if self.normalize else torch.ones_like(values[-1])
        energy = largest > torch.finfo(moment.dtype).tiny
        scale = torch.where(energy, largest, 1)
        lift = self.eps + (~energy).to(moment)  # a zero moment is treated as isotropic
        if vectors is None:
            weight = moment / scale
            weight.diagonal().add_(lift)
        else:
            weight = (vectors * (values / scale + lift) ** self.alpha) @ vectors.T
        self.W.copy_((weight + weight.T).div_(2))
        self.eigenvalues.copy_(descending(values))
