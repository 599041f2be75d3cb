"""LARC without apex: layer-wise adaptive rate control on top of SGD (You et al. 2017, arXiv:1708.03888).

For each parameter p with gradient g, learning rate η, trust coefficient t and weight decay λ::

    local = t ‖p‖ / (‖g‖ + λ ‖p‖ + ε)
    local = min(local / η, 1)              if clip
    g ← local (g + λ p)                    if ‖p‖ > 0 and ‖g‖ > 0; otherwise g is unchanged, without weight decay

Then SGD with momentum and without weight decay uses g. apex.parallel.LARC around torch's SGD computes the same, and its
state dict is also that of SGD, so checkpoints are interchangeable.
"""

from typing import Any

import torch
from classy_vision.optim.sgd import SGD as ClassySGD
from vissl.utils.misc import is_apex_available


class LARC(torch.optim.SGD):
    """SGD whose gradients are scaled per parameter.

    Args:
        params: parameters or parameter groups.
        trust_coefficient: t > 0, dimensionless.
        clip: limit the local rate to the learning rate of the group (LARC); otherwise the local rate multiplies it
            (LARS).
        eps: ε > 0, added to the denominator.
        exclude_bias_and_norm: do not scale or decay parameters with one axis. apex does not have this option.
        kwargs: arguments of ``torch.optim.SGD``: lr, momentum, weight_decay, nesterov.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
        >>> optimizer = LARC([p], lr=1.0, trust_coefficient=0.1, clip=False, eps=0.0)
        >>> p.grad = torch.tensor([[0.0, 2.0]])
        >>> optimizer.step()
        >>> p.data
        tensor([[3.0000, 3.5000]])
    """

    def __init__(
        self,
        params: Any,
        *,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
        exclude_bias_and_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, **kwargs)
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps
        self.exclude_bias_and_norm = exclude_bias_and_norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make one step. Afterwards ``grad`` contains the scaled gradients, as with apex."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not (self.exclude_bias_and_norm and p.ndim <= 1):
                    self._scale(p, group)
            group["weight_decay"] = 0.0  # the gradient already includes it
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss

    def _scale(self, p: torch.Tensor, group: dict[str, Any]) -> None:
        decay = group["weight_decay"]
        p_norm, g_norm = p.norm(), p.grad.norm()
        local = self.trust_coefficient * p_norm / (g_norm + decay * p_norm + self.eps)
        if self.clip:
            local = (local / group["lr"]).clamp(max=1.0)
        # a branch on the norms would synchronise with the device
        usable = (p_norm > 0) & (g_norm > 0)
        scaled = local * (p.grad + decay * p)
        p.grad.copy_(torch.where(usable, scaled, p.grad))


class PlainLARC(ClassySGD):
    """Classy Vision's ``sgd`` with ``use_larc``, but with the class above instead of apex."""

    def prepare(self, param_groups: Any) -> None:
        """Create the optimiser."""
        self.optimizer = LARC(
            param_groups,
            lr=self._lr,
            nesterov=self._nesterov,
            momentum=self._momentum,
            weight_decay=self._weight_decay,
            **self._larc_config,
        )


def needs_plain_larc(config: Any) -> bool:
    """Return whether an OPTIMIZER section uses LARC without apex, or an option that apex's LARC does not have."""
    if not config.use_larc or config.name != "sgd":
        return False
    return not is_apex_available() or "exclude_bias_and_norm" in config.larc_config
