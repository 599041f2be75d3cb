"""Matrix-SSL: matrix cross-entropies of covariances, with SimSiam's heads and a teacher (arXiv:2305.17326)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head
from plugins.losses import MatrixSSLTerms, matrix_ssl_pair_terms
from plugins.losses.log_series import SeriesWatch
from plugins.losses.matrix_entropy import Weights
from plugins.methods.common import LOG_EIGVALS, bottleneck_predictor, predictor_options, projector_options, view_pairs
from plugins.spec import Embeddings, MethodSpec, Option, Paper

_OF_LOSS = ("mce_lambd", "mce_mu", "gamma", "mce_order", "logarithm", "trace_term")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.options, self.comm = {name: options[name] for name in _OF_LOSS}, comm
        Weights(**self.options).check()
        self.watch = SeriesWatch("the Matrix-SSL loss", "set mce_mu to 1 or less")

    def forward(self, e: Embeddings) -> MatrixSSLTerms:
        pairs = [(e.p[a], e.target[b]) for a, b in view_pairs(e)]
        terms = matrix_ssl_pair_terms(pairs, **self.options, comm=self.comm)
        if self.training and self.options["logarithm"] == "series":
            self.watch(lambda: terms.radius)
        return terms


def projector(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    """Build three layers without biases and a final BatchNorm without scale and shift."""
    hidden, output = options["proj_hidden_dim"], options["proj_output_dim"]
    return mlp_head(features_dim, hidden, output, layers=3, bias=False, final_norm="plain", final_bias="frozen")


SPEC = MethodSpec(
    name="matrix_ssl",
    loss=_Loss,
    head=projector,
    predictor=bottleneck_predictor,
    teacher=True,
    views=None,
    options={
        **projector_options(hidden=2048, output=2048),
        **predictor_options(hidden=512),
        "mce_lambd": Option(1.0, "weight λ of the uniformity, >= 0; the original script's own default is 0.5", low=0),
        "mce_mu": Option(
            1.0,
            "μ that is added to the covariances' eigenvalues, >= 0, likewise; above 1 the series may diverge",
            low=0,
        ),
        "gamma": Option(1.0, "weight γ of the alignment, >= 0", low=0),
        "mce_order": Option(
            4, "order of the logarithm's series, >= 1; even orders resist a collapse onto a line", low=1
        ),
        "logarithm": Option(
            "series", "as in the published code; the exact one is another objective", choices=("series", "exact")
        ),
        "trace_term": Option(False, "the paper's + tr Q, which the published code leaves out"),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("Matrix-SSL", "Zhang, Tan, Yang, Huang and Yuan 2024, arXiv:2305.17326"),
)
