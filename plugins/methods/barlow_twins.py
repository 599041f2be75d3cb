"""Barlow Twins: the cross-correlation of two views' embeddings becomes the identity (arXiv:2103.03230)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head, ssv_barlow_head
from plugins.losses import BarlowTwinsLossTerms, barlow_twins_terms
from plugins.methods.common import HEAD, LOG_EIGVALS, SCALE_LOSS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.lambd, self.scale, self.comm = options["lambd"], options["scale_loss"], comm

    def forward(self, e: Embeddings) -> BarlowTwinsLossTerms:
        terms = barlow_twins_terms(*e.z, lambd=self.lambd, comm=self.comm)
        return terms._replace(loss=terms.loss * self.scale)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    widths = features_dim, options["proj_hidden_dim"], options["proj_output_dim"]
    if options["head"] == "ssv":
        return ssv_barlow_head(*widths)
    return mlp_head(*widths, layers=3, bias=False, final_bias=False)


SPEC = MethodSpec(
    name="barlow_twins",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=8192, output=8192),
        "head": HEAD,
        "lambd": Option(
            0.0051,
            "weight λ of the off-diagonal terms, >= 0",
            aliases={"lamb": None, "lambda_": None, "lambda_param": None},
            low=0,
        ),
        "scale_loss": replace(SCALE_LOSS, help="factor of the loss, > 0; the authors, solo-learn and VISSL have one"),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("Barlow Twins", "Zbontar, Jing, Misra, LeCun and Deny 2021, arXiv:2103.03230"),
)
