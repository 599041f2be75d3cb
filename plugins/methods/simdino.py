"""SimDINO: a teacher's cosine and the coding rate of the student's large views (Wu et al. 2025, arXiv:2502.10385)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.checks import check_range
from plugins.distributed import Collective
from plugins.heads import dino_mlp
from plugins.losses import SimDINOTerms, simdino_terms
from plugins.losses.simdino import EXPANSIONS, LEAST_EPS_D
from plugins.methods.common import LOG_EIGVALS, projector_options
from plugins.spec import Embeddings, MethodSpec, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        check_range("eps", options["eps"], low=LEAST_EPS_D * options["proj_output_dim"])
        self.options = {name: options[name] for name in ("eps", "similarity_weight", "expansion_of")}
        self.comm = comm

    def forward(self, e: Embeddings) -> SimDINOTerms:
        return simdino_terms(e.z, e.target, **self.options, comm=self.comm)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    widths = features_dim, options["proj_hidden_dim"], options["proj_output_dim"]
    return dino_mlp(*widths, norm=options["proj_norm"])


SPEC = MethodSpec(
    name="simdino",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=True,
    views=None,
    options={
        **projector_options(hidden=2048, output=256),
        "proj_norm": Option(False, "whether a batch norm follows each hidden layer of the projector"),
        "eps": Option(
            0.05, "square of the paper's ε, >= 1e-5 and >= 1e-5 D; a smaller one spreads the rows more", low=1e-5
        ),
        "similarity_weight": Option(1.0, "weight of the cosine of student and teacher, >= 0", low=0),
        "expansion_of": Option(
            "mean", "rows that spread: the mean of student and teacher, or the student's", choices=EXPANSIONS
        ),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("SimDINO", "Wu et al. 2025, arXiv:2502.10385"),
)
