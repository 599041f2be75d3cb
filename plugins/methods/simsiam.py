"""SimSiam: a prediction head and a stop-gradient, no teacher (Chen and He 2021, arXiv:2011.10566, eq. 2)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import mlp_head, ssv_simsiam_head
from plugins.methods.common import (
    HEAD,
    LOG_EIGVALS,
    CrossViewLoss,
    PairTerms,
    bottleneck_predictor,
    predictor_options,
    projector_options,
    two_layer_predictor,
    view_pairs,
)
from plugins.spec import Embeddings, MethodSpec, Paper


class SimSiamLoss(CrossViewLoss):
    """−(cos(p_0, y_1) + cos(p_1, y_0)) / 2, eq. 2; with more views the mean of −cos(p_a, y_b) over all pairs."""

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__({**options, "metric": "cosine"}, comm)

    def forward(self, e: Embeddings) -> PairTerms:
        """Return the mean of the negative cosines. BYOL's mean over the pairs is 2 plus twice this value."""
        terms = super().forward(e)
        return PairTerms(terms.loss / (2 * len(view_pairs(e))) - 1, terms.cosine)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    hidden, output = options["proj_hidden_dim"], options["proj_output_dim"]
    if options["head"] == "ssv":
        return ssv_simsiam_head(features_dim, hidden, output)
    return mlp_head(features_dim, hidden, output, layers=3, bias=False, final_bias=False, final_norm="plain")


def _predictor(options: Mapping[str, Any], comm: Collective) -> nn.Module:
    build = two_layer_predictor if options["head"] == "ssv" else bottleneck_predictor
    return build(options, comm)


SPEC = MethodSpec(
    name="simsiam",
    loss=SimSiamLoss,
    head=_head,
    predictor=_predictor,
    teacher=False,
    views=None,
    options={
        **projector_options(hidden=2048, output=2048),
        "head": HEAD,
        **predictor_options(hidden=512, constant_lr=True),  # section 4.2
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("SimSiam", "Chen and He 2021, arXiv:2011.10566, eq. 2"),
    log_name="train_neg_cos_sim",
)
