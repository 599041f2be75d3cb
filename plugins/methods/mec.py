"""MEC: the coding length of predictions and targets, with Matrix-SSL's networks (arXiv:2210.11464)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from plugins.checks import check_range, check_whole
from plugins.clock import Clock
from plugins.distributed import Collective
from plugins.losses import MECTerms, mec_pair_terms, mec_warmup
from plugins.losses.log_series import SeriesWatch
from plugins.losses.mec import LEAST_EPS_D
from plugins.methods import matrix_ssl
from plugins.methods.common import LOG_EIGVALS, predictor_options, projector_options, view_pairs
from plugins.spec import Embeddings, Option, Paper


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        # by their own names: the loss gets a tensor, which it does not check, and other names
        check_range("eps", options["eps"], low=LEAST_EPS_D * options["proj_output_dim"])
        check_whole("mec_order", options["mec_order"], low=1)
        check_range("warmup_iter", options["warmup_iter"], low=0)
        self.eps_d, self.order = options["eps"] / options["proj_output_dim"], options["mec_order"]
        self.warmup, self.comm = options["warmup_iter"], comm
        self.counter = Clock()
        self.watch = SeriesWatch("the MEC loss", "raise eps, or warmup_iter")

    def forward(self, e: Embeddings) -> MECTerms:
        eps_d = self.eps_d * mec_warmup(self.counter(), self.warmup)
        pairs = [(e.p[a], e.target[b]) for a, b in view_pairs(e)]
        terms = mec_pair_terms(pairs, eps_d=eps_d, order=self.order, comm=self.comm)
        if self.training and self.counter.first:
            self.watch(lambda: terms.radius)
        return terms


SPEC = replace(
    matrix_ssl.SPEC,
    name="mec",
    loss=_Loss,
    options={
        **projector_options(hidden=2048, output=2048),
        **predictor_options(hidden=512),
        "eps": Option(
            64.0, "distortion ε, of which each dimension bears ε / D, > 0; the smaller, the more it spreads", low=1e-6
        ),
        "mec_order": Option(4, "order of the logarithm's series, >= 1; even orders resist collapse", low=1),
        "warmup_iter": Option(0, "steps over which ε falls linearly from eight times its value, >= 0", low=0),
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("MEC", "Liu, Wang, Li and Wang 2022, arXiv:2210.11464"),
)
