"""DirectPred: the predictor is set to a power of the embedding's second moment (Tian et al. 2021, arXiv:2102.06810).

The same options give DirectCopy, IsoLoss and IsoCopy, whose SPECs differ from this one in defaults alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.methods.common import LOG_EIGVALS, METRIC, CrossViewLoss, projector_options, two_layer_head
from plugins.predictors import ClosedFormPredictor
from plugins.spec import MethodSpec, Option, Paper


def predictor(options: Mapping[str, Any], comm: Collective) -> nn.Module:
    """W = (C / lambda_max + eps I)^alpha of the running second moment C, arXiv:2102.06810 eqs. 18 and 19."""
    return ClosedFormPredictor(
        options["proj_output_dim"],
        alpha=options["alpha"],
        eps=options["eps"],
        rho=options["rho"],
        normalize=options["normalize"],
        mode=options["mode"],
        every=options["every"],
        center=options["center"],
        comm=comm,
    )


def closed_form_options(*, alpha: float, eps: float, iso: bool) -> dict[str, Option]:
    """Options of the closed-form predictor and its loss, with one method's defaults."""
    return {
        **projector_options(hidden=4096, output=256),
        "alpha": Option(alpha, "power of the second moment's eigenvalues, >= 0", aliases={"dp_alpha": None}, low=0),
        "eps": Option(
            eps, "added to the normalised eigenvalues before the power, >= 0", aliases={"eps_iso": None}, low=0
        ),
        "rho": Option(
            0.998, "retention of the second moment per update, in [0, 1)", aliases={"dp_tau": None}, low=0, high=1
        ),
        "normalize": Option(True, "divide the eigenvalues by the largest", aliases={"dp_normalize": None}),
        "iso": Option(iso, "IsoLoss: pass the gradient past the predictor instead of through it"),
        "metric": METRIC,
        "mode": Option(
            "sequential",
            "one update per view with its own prediction matrix, or one update on all views pooled",
            choices=("sequential", "pooled"),
        ),
        "every": Option(1, "updates between two eigendecompositions, >= 1", low=1),
        "center": Option(False, "subtract the running mean from the second moment"),
        "log_eigvals": LOG_EIGVALS,
    }


SPEC = MethodSpec(
    name="directpred",
    loss=CrossViewLoss,
    head=two_layer_head,
    predictor=predictor,
    teacher=True,
    views=None,
    options=closed_form_options(alpha=0.5, eps=0.0, iso=False),
    paper=Paper("DirectPred", "Tian, Chen and Ganguli 2021, arXiv:2102.06810, eqs. 18-19"),
    log_name="train_neg_cos_sim",
)
