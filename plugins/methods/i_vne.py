"""I-VNE+: agreement of the views and von Neumann entropy, no predictor and no teacher (arXiv:2304.01434)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head
from plugins.losses import IVNELossTerms, i_vne_terms
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.weights, self.comm = {name: options[name] for name in ("alpha_1", "alpha_2")}, comm

    def forward(self, e: Embeddings) -> IVNELossTerms:
        return i_vne_terms(*e.z, **self.weights, large=len(e.target), comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    hidden, output = options["proj_hidden_dim"], options["proj_output_dim"]
    return mlp_head(features_dim, hidden, output, layers=3, final_norm="affine")


SPEC = MethodSpec(
    name="i_vne",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=256),
        "alpha_1": Option(
            4.16,
            "weight α₁ of the cosine of the views, >= 0; published: log of the images in a step of all GPUs",
            low=0,
        ),
        "alpha_2": Option(1.0, "weight α₂ of the von Neumann entropy, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("I-VNE+", "Kim, Kang, Hwang, Shin and Rhee 2023, arXiv:2304.01434"),
)
