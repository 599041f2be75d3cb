"""Rectified LpJEPA: a sparse embedding of a given distribution, without predictor and teacher (arXiv:2602.01456)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head
from plugins.losses import RectifiedLpJEPALoss, RectifiedLpJEPALossTerms
from plugins.losses.rectified_lpjepa import PROJECTIONS, SIGMAS, TARGETS
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper

_OF_LOSS = (
    *("invariance_loss_weight", "rdm_reg_loss_weight", "num_projections", "projection_vectors_type"),
    *("target_distribution", "lp_norm_parameter", "mean_shift_value", "mode_of_sigma"),
)


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        of_loss = {name: options[name] for name in _OF_LOSS}
        self.rdm = RectifiedLpJEPALoss(**of_loss, seed=options["draws_seed"], comm=comm)

    def forward(self, e: Embeddings) -> RectifiedLpJEPALossTerms:
        return self.rdm.terms(e.z)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build Linear, BN, ReLU, Linear, BN, ReLU, Linear, and the ReLU of a rectified embedding."""
    head = mlp_head(features_dim, options["proj_hidden_dim"], options["proj_output_dim"], layers=3)
    return head.append(nn.ReLU()) if options["projector_type"] == "rectified_mlp" else head


SPEC = MethodSpec(
    name="rectified_lpjepa",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=2048),
        "projector_type": Option(
            "rectified_mlp", "whether the projector ends with a ReLU", choices=("rectified_mlp", "mlp")
        ),
        "invariance_loss_weight": Option(25.0, "weight of the squared difference of the views, >= 0", low=0),
        "rdm_reg_loss_weight": Option(
            125.0, "weight of the distance to the target distribution, >= 0; 250 published for CIFAR-100", low=0
        ),
        "num_projections": Option(8192, "number P of directions of a step, >= 1", low=1),
        "projection_vectors_type": Option(
            "random", "random directions alone, or after singular vectors of each view", choices=PROJECTIONS
        ),
        "target_distribution": Option(TARGETS[0], "max(X, 0) or X, for X of GN_p(μ, σ)", choices=TARGETS),
        "lp_norm_parameter": Option(1.0, "p of the target: 1 Laplace, 2 Gaussian; in [0.1, 100]", low=0.1, high=100),
        "mean_shift_value": Option(
            0.0, "μ of the target, in [-100, 100]; the embedding is sparser for a smaller one", low=-100, high=100
        ),
        "mode_of_sigma": Option(
            "sigma_GN", "σ of the target: X or (sigma_RGN) max(X, 0) has the variance 1", choices=SIGMAS
        ),
        "draws_seed": Option(0, "seed of the directions and targets, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("Rectified LpJEPA", "Kuang, Dagade, Rudner, Balestriero and LeCun 2026, arXiv:2602.01456"),
    log_name="train_rectified_lp_jepa_loss",
)
