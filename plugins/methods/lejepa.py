"""LeJEPA: no predictor, no teacher and no stop-gradient (arXiv:2511.08544)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head
from plugins.losses import LeJEPALoss, LeJEPALossTerms
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        of_loss = {name: options[name] for name in ("num_directions", "sigreg_weight", "t_max", "knots")}
        self.lejepa = LeJEPALoss(**of_loss, seed=options["directions_seed"], comm=comm)

    def forward(self, e: Embeddings) -> LeJEPALossTerms:
        return self.lejepa.terms(e.z, large=len(e.target))


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build Linear, BN, ReLU, Linear, BN, ReLU, Linear."""
    return mlp_head(features_dim, options["proj_hidden_dim"], options["proj_output_dim"], layers=3)


SPEC = MethodSpec(
    name="lejepa",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=128),
        "sigreg_weight": Option(
            0.05, "weight λ of SIGReg, in [0, 1]; 1 - λ is that of the prediction", {"lambda_param": None}, None, 0, 1
        ),
        "num_directions": Option(
            1024, "number M of random directions of a step, >= 1", aliases={"sigreg_num_vectors": None}, low=1
        ),
        "t_max": Option(
            5.0, "end of the characteristic function's domain [0, t_max], > 0", {"sigreg_t_max": None}, low=1e-6
        ),
        "knots": Option(17, "points of the quadrature on the domain, >= 2", aliases={"sigreg_knots": None}, low=2),
        "directions_seed": Option(0, "seed of the directions, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("LeJEPA", "Balestriero and LeCun 2025, arXiv:2511.08544"),
)
