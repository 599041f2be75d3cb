"""DINO as the authors of DISSL trained it (Dubois et al. 2022, arXiv:2209.06235), for comparison with their results.

``method: dino`` selects it together with an option that solo-learn's own DINO does not have, such as ``n_classes``. It
differs from solo-learn's DINO: the head has one hidden layer and normalises rows before the bottleneck, batch
statistics are computed over both views, the teacher's head has its own random initialisation, and the centre is updated
after each view (:mod:`plugins.losses.dino`).
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from torch import nn

from plugins.distributed import Collective
from plugins.heads import SharedHead, issl_head, issl_init_
from plugins.losses import DINOLoss, DINOTerms, dino
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from solo_ext.method import TeacherMethod


class _Criterion(DINOLoss):
    """DINO's loss with the options of SPEC; the teacher's second view comes first, as published."""

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__(
            options["n_classes"],
            tau_student=options["student_temperature"],
            tau_teacher=teacher_temperature(options, 0),
            center_momentum=options["center_momentum"],
            moves="view",
            comm=comm,
        )

    def forward(self, e: Embeddings) -> DINOTerms:
        return super().forward(e.z[::-1], e.target[::-1])


def teacher_temperature(options: Mapping[str, Any], epoch: int) -> float:
    """Return the teacher's temperature τ_t in an epoch, which changes linearly from its first to its last value."""
    first, last = options["warmup_teacher_temperature"], options["teacher_temperature"]
    return dino.teacher_temperature(epoch, first=first, last=last, epochs=options["warmup_teacher_temperature_epochs"])


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    layers = {"layers": 1, "hidden_dim": options["proj_hidden_dim"], "activation": "gelu", "last": "cosine"}
    rank = {"bottleneck": options["proj_output_dim"], "bottleneck_norm": False}
    return SharedHead(*issl_head(features_dim, options["n_classes"], **layers, **rank))


SPEC = MethodSpec(
    name="dino",
    loss=_Criterion,
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
)


class PublishedDINO(TeacherMethod):
    """The method of SPEC."""

    spec = SPEC

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        issl_init_(self.momentum_projector)  # not a copy of the student's head

    def on_train_epoch_start(self) -> None:
        """Set the teacher's temperature."""
        super().on_train_epoch_start()
        self.objective.criterion.tau_teacher = teacher_temperature(self.options, self.current_epoch)

    def on_after_backward(self) -> None:
        """Remove the gradient of the last layer in the first epochs."""
        super().on_after_backward()
        if self.current_epoch < self.options["freeze_last_layer"]:
            self.projector[-1].weight.grad = None
