"""CorInfoMax: agreement of the views and log-determinants of running covariances (arXiv:2209.07999)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import plain_head
from plugins.losses import CorInfoMaxLoss, CorInfoMaxLossTerms
from plugins.losses.corinfomax import LEAST_EPS, MOST_MOMENTUM
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper

SETTINGS = ("initial_covariance", "sim_weight", "cov_weight", "mean_momentum", "covariance_momentum", "eps")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        settings = {name: options[name] for name in SETTINGS}
        self.corinfomax = CorInfoMaxLoss(options["proj_output_dim"], **settings, comm=comm)

    def forward(self, e: Embeddings) -> CorInfoMaxLossTerms:
        return self.corinfomax.terms(*e.z)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    widths = options["proj_hidden_dim"], options["proj_output_dim"]
    return plain_head(features_dim, *widths, layers=3, norm=options["proj_norm"], final_bias=False)


SPEC = MethodSpec(
    name="corinfomax",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=64),
        "proj_norm": Option(False, "whether a batch norm follows each hidden layer of the projector"),
        "sim_weight": Option(
            250.0, "weight α of the mean squared difference of the views, >= 0", {"sim_loss_weight": None}, low=0
        ),
        "cov_weight": Option(1.0, "weight β of the log-determinants, >= 0", {"cov_loss_weight": None}, low=0),
        "covariance_momentum": Option(
            0.01,
            "share λ_R of the running covariance that is kept per step, >= 0; the batch has the rest",
            {"la_R": None},
            low=0,
            high=MOST_MOMENTUM,
        ),
        "mean_momentum": Option(
            0.01,
            "share λ_μ of the running mean that is kept per step, >= 0",
            {"la_mu": None},
            low=0,
            high=MOST_MOMENTUM,
        ),
        "initial_covariance": Option(
            1.0, "the covariance before the first step, a multiple of the identity, >= 0", {"R_ini": None}, low=0
        ),
        "eps": Option(
            1e-8, "added to the eigenvalues of the covariance, >= 1e-10", {"R_eps_weight": None}, low=LEAST_EPS
        ),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("CorInfoMax", "Ozsoy, Hamdan, Arik, Yuret and Erdogan 2022, arXiv:2209.07999"),
)
