"""BYOL: a prediction head and an exponential-moving-average teacher (Grill et al. 2020, arXiv:2006.07733, eq. 2)."""

from plugins.methods.common import (
    LOG_EIGVALS,
    METRIC,
    SCALE_LOSS,
    CrossViewLoss,
    predictor_options,
    projector_options,
    two_layer_head,
    two_layer_predictor,
)
from plugins.spec import MethodSpec, Paper

SPEC = MethodSpec(
    name="byol",
    loss=CrossViewLoss,
    head=two_layer_head,
    predictor=two_layer_predictor,
    teacher=True,
    views=None,
    options={
        **projector_options(hidden=4096, output=256),
        **predictor_options(hidden=4096),
        "metric": METRIC,
        "scale_loss": SCALE_LOSS,
        "log_eigvals": LOG_EIGVALS,
    },
    paper=Paper("BYOL", "Grill et al. 2020, arXiv:2006.07733, eq. 2"),
    log_name="train_neg_cos_sim",
)
