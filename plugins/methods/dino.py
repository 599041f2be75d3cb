"""DINO: predict a teacher's centred and sharpened assignments (Caron et al. 2021, arXiv:2104.14294)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.clock import Clock
from plugins.distributed import Collective
from plugins.heads import dino_head, ssv_dino_head
from plugins.losses import DINOLoss, DINOTerms, teacher_temperature
from plugins.methods.common import HEAD
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper


class DINOCriterion(nn.Module):
    """DINO's loss with the teacher temperature of the epoch.

    Args:
        options: of SPEC.
        comm: the processes that share the batch.
        classes: number of columns of the logits.
        moves: when the centre moves, "batch" or "view".
    """

    def __init__(self, options: Mapping[str, Any], comm: Collective, classes: int, moves: str = "batch") -> None:
        super().__init__()
        self.schedule = {
            "first": options["warmup_teacher_temperature"],
            "last": options["teacher_temperature"],
            "epochs": options["warmup_teacher_temperature_epochs"],
        }
        self.clock = Clock()
        self.dino = DINOLoss(
            classes,
            tau_student=options["student_temperature"],
            center_momentum=options["center_momentum"],
            moves=moves,
            comm=comm,
        )

    def forward(self, e: Embeddings) -> DINOTerms:
        """Return the loss of the predictions of all views of the teacher's assignments of the others."""
        self.clock()
        epoch = self.clock.epochs() if self.schedule["epochs"] else 0
        if epoch is None:
            raise ValueError(
                "the teacher's temperature depends on the epoch, whose number is unknown; call start_epoch at the "
                "start of each epoch, or set warmup_teacher_temperature_epochs to 0"
            )
        self.dino.tau_teacher = teacher_temperature(epoch, **self.schedule)
        return self.dino(e.z, e.target)


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    if options["head"] == "ssv":
        return ssv_dino_head(features_dim, options["proj_hidden_dim"], options["num_prototypes"])
    widths = options["proj_hidden_dim"], options["bottleneck_dim"], options["num_prototypes"]
    return dino_head(features_dim, *widths, norm=options["proj_norm"])


def _hints(options: Mapping[str, Any]) -> Mapping[str, Hints]:
    epochs = options["freeze_last_layer"]
    return {"projector.last_layer": Hints(frozen_epochs=epochs)} if epochs else {}  # a head of the user's may lack it


SPEC = MethodSpec(
    name="dino",
    loss=lambda options, comm: DINOCriterion(options, comm, options["num_prototypes"]),
    head=_head,
    predictor=None,
    teacher=True,
    views=None,
    options={
        "head": HEAD,
        "proj_hidden_dim": Option(2048, "width of the projector's hidden layers, > 0", low=1),
        "proj_norm": Option(False, "whether a batch norm follows each hidden layer of the projector"),
        "bottleneck_dim": Option(256, "width of the rows before the last layer, > 0", low=1),
        "num_prototypes": Option(65536, "number of prototypes, the width of the logits, >= 2", low=2),
        "student_temperature": Option(0.1, "temperature of the predictions, > 0", low=1e-6),
        "teacher_temperature": Option(0.04, "temperature of the assignments, > 0; 0.07 with a warm-up", low=1e-6),
        "warmup_teacher_temperature": Option(
            0.04, "teacher temperature in the first epoch of its warm-up, > 0", low=1e-6
        ),
        "warmup_teacher_temperature_epochs": Option(
            0, "epochs in which that temperature rises to teacher_temperature, >= 0; 30 of 100 in the paper", low=0
        ),
        "center_momentum": Option(0.9, "share of the centre that is kept per step, in [0, 1]", low=0, high=1),
        "freeze_last_layer": Option(1, "epochs at the start of the run in which the last layer is frozen, >= 0", low=0),
    },
    paper=Paper("DINO", "Caron et al. 2021, arXiv:2104.14294, eqs. 1-4"),
    width="num_prototypes",
    hints=_hints,
    log_name="dino_loss",
)
