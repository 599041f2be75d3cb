"""DINO as the authors of DISSL trained it (Dubois et al. 2022, arXiv:2209.06235), for comparison with their results.

It differs from DINO: the head has one hidden layer and normalises rows before the bottleneck, batch statistics are
computed over both views, the teacher's head has its own random initialisation, and the centre moves after each view.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.distributed import Collective
from plugins.heads import SharedHead, issl_head, issl_init_
from plugins.losses import DINOTerms
from plugins.methods import dino
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper


class _Loss(dino.DINOCriterion):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__(options, comm, options["n_classes"], moves="view")

    def forward(self, e: Embeddings) -> DINOTerms:
        """Return DINO's loss; the teacher's second view comes first, as published."""
        return super().forward(e._replace(z=e.z[::-1], target=e.target[::-1]))


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    layers = {"layers": 1, "hidden_dim": options["proj_hidden_dim"], "activation": "gelu", "last": "cosine"}
    rank = {"bottleneck": options["proj_output_dim"], "bottleneck_norm": False}
    return SharedHead(*issl_head(features_dim, options["n_classes"], **layers, **rank))


_LAST_LAYER = "projector.5"


def _hints(options: Mapping[str, Any]) -> Mapping[str, Hints]:
    epochs = options["freeze_last_layer"]
    return {_LAST_LAYER: Hints(frozen_epochs=epochs)} if epochs else {}


SPEC = MethodSpec(
    name="dino",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=True,
    views=2,
    options={
        "n_classes": Option(1000, "C pseudo-classes, >= 2", aliases={"n_equivalence_classes": None}, low=2),
        "proj_hidden_dim": Option(1024, "width of the head's hidden layer, > 0", low=1),
        "proj_output_dim": Option(256, "width of the head's bottleneck, > 0", low=1),
        "student_temperature": Option(0.1, "temperature of the predictions, > 0", low=1e-6),
        "teacher_temperature": Option(0.07, "temperature of the assignments, > 0", low=1e-6),
        "warmup_teacher_temperature": Option(0.04, "temperature of the assignments in the first epoch, > 0", low=1e-6),
        "warmup_teacher_temperature_epochs": Option(50, "epochs of the change to teacher_temperature, >= 0", low=0),
        "center_momentum": Option(0.9, "momentum of the centre, in [0, 1]", low=0, high=1),
        "freeze_last_layer": Option(1, "first epochs in which the last layer is not trained, >= 0", low=0),
    },
    paper=Paper("DINO", "Caron et al. 2021, arXiv:2104.14294, as in Dubois et al. 2022, arXiv:2209.06235"),
    width="n_classes",
    hints=_hints,
    teacher_init=issl_init_,
    log_name="dino_loss",
)
