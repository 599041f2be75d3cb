"""SSL-EY: the Eckart-Young loss of canonical correlation analysis, no predictor and no teacher (arXiv:2310.01012)."""

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head
from plugins.losses import SSLEYLossTerms, ssl_ey_terms
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.estimator, self.comm = options["estimator"], comm

    def forward(self, e: Embeddings) -> SSLEYLossTerms:
        return ssl_ey_terms(*e.z, estimator=self.estimator, comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    hidden, output = options["proj_hidden_dim"], options["proj_output_dim"]
    if options["projector"]:
        layers, bias, widths = options["proj_layers"], options["proj_output_bias"], options["proj_hidden_widths"]
        hidden = hidden if widths == "equal" else _widths(widths)
        return mlp_head(features_dim, hidden, output, layers=layers, final_bias=bias)
    if output != features_dim:
        raise ValueError(f"without a projector proj_output_dim is that of the features, {features_dim}, got {output}")
    return nn.Identity()


def _widths(text: str) -> list[int]:
    """Parse the widths of hidden layers in the form of VICReg's ``--mlp``.

    >>> _widths("8192-4096")
    [8192, 4096]
    """
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", text, re.ASCII):
        raise ValueError(f"proj_hidden_widths must be equal, or widths such as 8192-4096, got {text!r}")
    return [int(width) for width in text.split("-")]


SPEC = MethodSpec(
    name="ssl_ey",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=2048),
        "proj_layers": Option(3, "number of linear layers of the projector, > 0", low=1),
        "proj_hidden_widths": Option(
            "equal",
            "equal, or the widths of the projector's hidden layers, such as 8192-4096, instead of proj_hidden_dim and "
            "proj_layers",
        ),
        "proj_output_bias": Option(
            True, "whether the projector's last layer has a bias; the loss does not depend on it"
        ),
        "projector": Option(True, "whether there is a projector; without one the loss takes the backbone's features"),
        "estimator": Option(
            "plugin",
            "of the squared norm of the covariance: from all rows, from two halves, or the unbiased U-statistic",
            choices=("plugin", "split", "ustat"),
        ),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("SSL-EY", "Chapman, Wells and Lawry Aguila 2024, arXiv:2310.01012"),
    unbounded=True,
    fork_names=("ssley",),
    log_name="train_ssley_loss",
)
