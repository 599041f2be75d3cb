"""The LARS optimiser and the learning-rate schedule of solo-learn's main branch.

solo-learn 1.0.2 wraps SGD in a LARSWrapper that rescales the gradients *before* it runs the closure. Current releases
of Lightning compute the gradients inside the closure, so that training would be plain SGD without weight decay.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, arXiv:1708.03888, eq. 6) with momentum, as in solo-learn.

    For a parameter w with gradient g, in a group of learning rate ``lr`` and weight decay ``wd``::

        r = eta |w| / (|g| + wd |w| + eps),   with clip_lr:  r = min(r / lr, 1)
        g ← r (g + wd w);   m ← momentum m + g;   w ← w − lr m

    With ``exclude_bias_n_norm``, one-dimensional parameters (biases, normalisation) use the plain gradient g, without
    the factor r and without weight decay. The same applies if |w| or |g| is 0.

    Args:
        params: parameters or groups of them.
        lr: learning rate, > 0.
        momentum: in [0, 1).
        dampening: dampening of the momentum, in [0, 1).
        weight_decay: >= 0.
        nesterov: whether to use Nesterov's momentum.
        eta: trust coefficient, > 0.
        eps: added to the denominator, > 0.
        clip_lr: whether to limit the learning rate of each layer to that of plain SGD.
        exclude_bias_n_norm: whether one-dimensional parameters use the plain gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eta: float = 1e-3,
        eps: float = 1e-8,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eta": eta,
            "eps": eps,
            "clip_lr": clip_lr,
            "exclude_bias_n_norm": exclude_bias_n_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the closure, which computes the gradients, and take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        if not (group["exclude_bias_n_norm"] and parameter.ndim <= 1):
            gradient = _scaled(parameter, gradient, group)
        momentum = group["momentum"]
        if momentum:
            state = self.state[parameter]
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
            else:
                buffer = state["momentum_buffer"] = gradient.clone()
            gradient = gradient.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        parameter.add_(gradient, alpha=-group["lr"])


def _scaled(parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """Return r (g + wd w), or g if a norm is 0, without a host synchronisation."""
    decay = group["weight_decay"]
    weight_norm, gradient_norm = parameter.norm(), gradient.norm()
    rate = group["eta"] * weight_norm / (gradient_norm + decay * weight_norm + group["eps"])
    if group["clip_lr"]:
        # lr is 0 at the end of a cosine schedule
        rate = (rate / max(group["lr"], torch.finfo(torch.float32).tiny)).clamp(max=1.0)
    adaptive = (weight_norm > 0) & (gradient_norm > 0)
    return torch.where(adaptive, gradient.add(parameter, alpha=decay) * rate, gradient)


class _ClosedFormLR(LRScheduler):
    """A schedule whose learning rate is a function of ``last_epoch`` and of the base rate: :meth:`_rate`.

    Args:
        optimizer: the optimiser.
        static: {index of a parameter group: its constant learning rate}.
    """

    def __init__(self, optimizer: Optimizer, static: dict[int, float] | None) -> None:
        self.static = dict(static or {})
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Return only the progress; the configuration defines the shape, so that a run can be made longer."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count, "_last_lr": list(self._last_lr)}

    def get_lr(self) -> list[float]:
        """Return the present learning rate of each group."""
        return [self.static.get(index, self._rate(base)) for index, base in enumerate(self.base_lrs)]

    def _rate(self, base: float) -> float:
        raise NotImplementedError


class EpochWarmupLR(_ClosedFormLR):
    """The schedule of Self-Supervised-Vision, which changes after each epoch, in closed form.

    With W warm-up epochs of E in all and base rate b, epoch t = 0 … E − 1 has::

        lr(t) = b max(1, t) / W                                   t < W
        lr(t) = b (1 + cos(π (t − W) / (E − W))) / 2              else, decay = "cosine"
        lr(t) = b factor^(number of milestones m with m ≤ t − W)  else, decay = "step"
        lr(t) = b                                                 else, decay = "none"

    The first two epochs of a warm-up have the same rate.

    Args:
        optimizer: the optimiser.
        warmup_epochs: W, >= 0.
        epochs: E.
        decay: "cosine", "step" or "none".
        milestones: of "step", in epochs after the warm-up.
        factor: of "step", in (0, 1].
        static: {index of a parameter group: its constant learning rate}.

    Reference:
        github.com/NishantPrabhu/Self-Supervised-Vision, ``adjust_learning_rate`` and utils/train_utils.py.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_epochs: float,
        epochs: int,
        *,
        decay: str = "cosine",
        milestones: Iterable[int] = (),
        factor: float = 0.1,
        static: dict[int, float] | None = None,
    ) -> None:
        self.warmup, self.epochs, self.decay = warmup_epochs, epochs, decay
        self.milestones, self.factor = [*milestones], factor
        super().__init__(optimizer, static)

    def _rate(self, base: float) -> float:
        return base * self._factor(self.last_epoch)

    def _factor(self, epoch: int) -> float:
        if epoch < self.warmup:
            return max(1, epoch) / self.warmup
        past = epoch - self.warmup
        if self.decay == "step":
            return self.factor ** sum(milestone <= past for milestone in self.milestones)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * min(past / max(self.epochs - self.warmup, 1), 1.0))) / 2
        return 1.0


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "lars": LARS,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""The optimisers by ``optimizer.name``."""


class WarmupCosineLR(_ClosedFormLR):
    """Linear warm-up, then half a cosine, as solo-learn's LinearWarmupCosineAnnealingLR, in closed form.

    With T_w warm-up steps of T in all, base rate b, start s and end e::

        lr(t) = s + (b − s) t / (T_w − 1)                            t < T_w
        lr(t) = e + (b − e) (1 + cos(π (t − T_w) / (T − T_w))) / 2   else

    Args:
        optimizer: the optimiser.
        warmup_steps: T_w, >= 0.
        total_steps: T.
        start_lr: s.
        end_lr: e.
        static: {index of a parameter group: its constant learning rate}.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: float,
        total_steps: float,
        start_lr: float = 0.0,
        end_lr: float = 0.0,
        static: dict[int, float] | None = None,
    ) -> None:
        self.warmup_steps = float(warmup_steps)
        self.total_steps = float(total_steps)
        self.start_lr = float(start_lr)
        self.end_lr = float(end_lr)
        super().__init__(optimizer, static)

    def _rate(self, base: float) -> float:
        step = self.last_epoch
        if step < self.warmup_steps:
            return self.start_lr + (base - self.start_lr) * min(step / max(self.warmup_steps - 1, 1), 1.0)
        span = max(self.total_steps - self.warmup_steps, 1)
        progress = min((step - self.warmup_steps) / span, 1.0)
        return self.end_lr + (base - self.end_lr) * (1 + math.cos(math.pi * progress)) / 2
