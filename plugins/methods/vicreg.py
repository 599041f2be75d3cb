"""VICReg: invariance, variance and covariance terms, no predictor and no teacher (arXiv:2105.04906)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.losses import VICRegLossTerms, vicreg_terms
from plugins.methods import ssl_ey
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, Option, Paper

COEFFICIENTS = ("sim_coeff", "std_coeff", "cov_coeff")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.weights, self.comm = {name: options[name] for name in COEFFICIENTS}, comm

    def forward(self, e: Embeddings) -> VICRegLossTerms:
        return vicreg_terms(*e.z, **self.weights, comm=self.comm)


def _sum_to_mean(weight: Any) -> Any:
    # solo-learn's weight of the sum over both views; a value that is no number fails the check of the range
    return 2 * weight if isinstance(weight, int | float) else weight


SPEC = replace(
    ssl_ey.SPEC,
    name="vicreg",
    loss=_Loss,
    options={
        **projector_options(hidden=8192, output=8192),
        "proj_layers": ssl_ey.SPEC.options["proj_layers"],
        "proj_hidden_widths": ssl_ey.SPEC.options["proj_hidden_widths"],
        "proj_output_bias": Option(False, "whether the projector's last layer has a bias, which changes no statistic"),
        "projector": ssl_ey.SPEC.options["projector"],
        "sim_coeff": Option(
            25.0,
            "weight λ of the mean squared difference of the views, >= 0",
            aliases={"sim_loss_weight": None, "lambda_param": None},
            low=0,
        ),
        "std_coeff": Option(
            25.0,
            "weight μ of the hinge on the standard deviations, the mean over views, >= 0; solo-learn's is of the sum",
            aliases={"var_loss_weight": _sum_to_mean, "mu_param": None},
            low=0,
        ),
        "cov_coeff": Option(
            1.0,
            "weight ν of the squared covariances of different columns, >= 0",
            aliases={"cov_loss_weight": None, "nu_param": None},
            low=0,
        ),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("VICReg", "Bardes, Ponce and LeCun 2022, arXiv:2105.04906"),
    fork_names=(),
    log_name="",
)
