"""Monitoring of a DISSL run: warm-ups of the weights, an alarm for stalled runs, and the distance to an ETF.

The published code of arXiv:2209.06235 has the warm-ups in its VISSL fork and the distance to an equiangular tight frame
in its own repository.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from plugins.checks import check_range, check_rows, compute_dtype
from plugins.clock import RowMeans, Stepped
from plugins.distributed import LOCAL, Collective


class DISSLWeights(NamedTuple):
    """The weights of :func:`dissl_loss` at one step, named as its arguments."""

    lambda_maximality: Float[Tensor, "*S"]
    beta_det_inv: Float[Tensor, "*S"]
    distillation_weight: Float[Tensor, "*S"]


def dissl_warmup(
    step: Tensor,
    *,
    lambda_maximality: float = 2.3,
    beta_det_inv: float = 0.8,
    warmup_lambda: int = 0,
    warmup_beta: int = 0,
    warmup_distillation: int = 0,
) -> DISSLWeights:
    """Return weights that rise linearly over K steps each: λ from β + 1, β from λ, the distillation weight from 0.

    At step k < K, the fraction ``(1 + k) / K`` of the way is covered. K = 0 means no warm-up. The call does not
    synchronise with the device.

    Args:
        step: k ≥ 1; it is 1 at the first step.
        lambda_maximality: value of λ after its warm-up.
        beta_det_inv: value of β after its warm-up.
        warmup_lambda: K of λ, in steps.
        warmup_beta: K of β, in steps.
        warmup_distillation: K of the distillation weight, in steps.

    >>> [round(weight.item(), 3) for weight in dissl_warmup(torch.tensor(4), warmup_lambda=10, warmup_beta=10)]
    [2.05, 1.55, 1.0]
    """

    def way(start: float, end: float, length: int) -> Tensor:
        covered = torch.where(step < length, (1 + step) / max(length, 1), 1.0)
        return start + (end - start) * covered

    return DISSLWeights(
        way(beta_det_inv + 1, lambda_maximality, warmup_lambda),
        way(lambda_maximality, beta_det_inv, warmup_beta),
        way(0.0, 1.0, warmup_distillation),
    )


class StallAlarm(nn.Module):
    """Warn once if the assignments are still uniform after the warm-up: the run will not leave that state.

    DISSL stays at uniform assignments if the augmentations are too strong, or the learning rate too low. There the loss
    is (w - λ + β) log C and its gradient vanishes.

    Args:
        classes: C ≥ 2, the number of pseudo-classes.
        after: step of the first check, not before the end of the warm-up; 0 means the first step.
        every: steps between two checks, ≥ 1. Only the first call and the checks synchronise with the device.
        threshold: fraction of log C, in (0, 1]. A mean entropy of the assignments above it counts as a stall.

    Buffers:
        rung: ``[]``, bool, whether the warning was given. A resumed run does not repeat it. If a state dict lacks the
            entry, it is False.

    >>> alarm = StallAlarm(16, after=0, every=1)
    >>> alarm(torch.tensor(1.0), step=1)
    False
    """

    rung: Tensor

    def __init__(self, classes: int, *, after: int, every: int = 200, threshold: float = 0.95) -> None:
        super().__init__()
        check_range("classes", classes, low=2)
        check_range("after", after, low=0)
        check_range("every", every, low=1)
        check_range("threshold", threshold, low=0, high=1)
        self.classes, self.after, self.every, self.threshold = classes, max(after, 1), every, threshold
        self.steps: int | None = None
        self._done = False
        self.register_buffer("rung", torch.tensor(False))

    def forward(self, H_Mlz: Float[Tensor, ""], step: Tensor | int) -> bool:
        """Check the ``DISSLTerms.H_Mlz`` of one step.

        Args:
            H_Mlz: mean entropy of an assignment, in nats.
            step: number of steps of the run, this one included. It is read in the first call only, because a resumed
                run does not start at 1. Each further call counts as one step.

        Returns:
            Whether this call warned.
        """
        if self.steps is None:
            self.steps, self._done = int(step), bool(self.rung)
        else:
            self.steps += 1
        if self._done or self.steps < self.after or (self.steps - self.after) % self.every:
            return False
        share = H_Mlz.item() / math.log(self.classes)
        if share > self.threshold:
            self._done = True
            self.rung.fill_(True)
            warnings.warn(
                f"DISSL has stalled at uniform assignments: after {self.steps} steps their mean entropy is {share:.1%} "
                f"of log {self.classes}; use weaker augmentations, a higher learning rate or a warm-up of beta",
                stacklevel=4,  # above are two functions of torch's
            )
        return self._done

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}rung", torch.tensor(False))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.steps = None


class ETFTerms(NamedTuple):
    """Mean cosines between the representations of a batch. The ideal is an equiangular tight frame (ETF)."""

    cosine_pos: Float[Tensor, ""]
    """Mean cosine of two views of an image; ideally 1."""
    cosine_neg: Float[Tensor, ""]
    """Mean cosine of views of different images; ideally -1 / (classes - 1)."""
    dist_to_etf: Float[Tensor, ""]
    """``1 - cosine_pos + cosine_neg``."""


class ETFMonitor(Stepped, nn.Module):
    """Compute cosines of two views' representations about their running mean, for logging, without gradient.

    The centre is the average of the batch mean and the running mean of the batch means. The running mean is updated in
    training mode only. The micro-batches of an optimiser step count as one batch.

    Args:
        dim: width D of the representations.
        rate: weight of a batch in the running mean, in [0, 1].
        comm: the processes whose batch means are averaged, so that the running mean is identical on all of them. The
            cosines are computed from the rows of this process.

    Buffers:
        mean: ``[D]``, the running mean, initially zero.

    >>> z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> [term.item() for term in ETFMonitor(2)(z, z)]
    [1.0, -1.0, -1.0]
    """

    mean: Tensor

    def __init__(self, dim: int, *, rate: float = 0.1, comm: Collective = LOCAL) -> None:
        super().__init__()
        check_range("dim", dim, low=1)
        check_range("rate", rate, low=0, high=1)
        self.rate, self.comm = rate, comm
        self.register_buffer("mean", torch.zeros(dim))
        self._before: Tensor | None = None  # the mean before the open step
        self._seen = RowMeans()

    def after_step(self) -> None:
        """End the open step."""
        super().after_step()
        self._before, self._seen = None, RowMeans()

    @torch.no_grad()
    def forward(self, z0: Float[Tensor, "B D"], z1: Float[Tensor, "B D"]) -> ETFTerms:
        check_rows(z0=z0, z1=z1)
        if len(z0) < 2:
            raise ValueError(f"cosines of different images need at least 2 rows, got {len(z0)}")
        with torch.autocast(z0.device.type, enabled=False):
            z = torch.stack([z0, z1]).to(compute_dtype(z0.dtype))
            total = self.comm.sum(torch.cat([z.sum((0, 1)), z.new_full((1,), 2 * len(z0))]))
            batch = total[:-1] / total[-1]
            x, y = F.normalize(z - (batch + self.mean.to(batch)) / 2, dim=2)
            if self.training:
                self._follow(batch.to(self.mean), total[-1])
            positive = (x * y).sum(1).mean()
            # the sum over all pairs is the product of the sums
            negative = ((x.sum(0) * y.sum(0)).sum() - positive * len(x)) / (len(x) * (len(x) - 1))
        return ETFTerms(positive, negative, 1 - positive + negative)

    def _follow(self, batch: Tensor, rows: Tensor) -> None:
        if self.stepping:
            if self._before is None:
                self._before = self.mean.clone()
            self.mean.copy_(self._before)
            (batch,), _ = self._seen.add([batch], rows)
        self.mean.lerp_(batch, self.rate)
