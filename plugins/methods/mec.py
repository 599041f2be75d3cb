"""MEC: the coding length of predictions and targets, with Matrix-SSL's networks (arXiv:2210.11464)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.losses import MECTerms, mec_terms, mec_warmup
from plugins.losses.log_series import SeriesWatch
from plugins.methods import matrix_ssl
from plugins.methods.common import LOG_EIGVALS, StepCounter, predictor_options, projector_options
from plugins.spec import Embeddings, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.eps_d, self.order = options["eps"] / options["proj_output_dim"], options["mec_order"]
        self.warmup, self.comm = options["warmup_iter"], comm
        self.counter = StepCounter()
        self.watch = SeriesWatch("the MEC loss", "raise eps, or warmup_iter")

    def forward(self, e: Embeddings) -> MECTerms:
        eps_d = self.eps_d * mec_warmup(self.counter(), self.warmup)
        terms = mec_terms(*e.p, *e.target, eps_d=eps_d, order=self.order, comm=self.comm)
        if self.training:
            self.watch(lambda: terms.radius)
        return terms


SPEC = replace(
    matrix_ssl.SPEC,
    name="mec",
    loss=_Loss,
    options={
        **projector_options(hidden=2048, output=2048),
        **predictor_options(hidden=512),
        "eps": Option(64.0, "distortion ε, of which each dimension bears ε / D, > 0; the smaller, the more it spreads"),
        "mec_order": Option(4, "order of the logarithm's series, >= 1; even orders resist collapse"),
        "warmup_iter": Option(0, "steps over which ε falls linearly from eight times its value, >= 0"),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("MEC", "Liu, Wang, Li and Wang 2022, arXiv:2210.11464"),
)
