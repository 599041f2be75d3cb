"""DINO as the authors of DISSL trained it, for the comparison with theirs (Dubois et al. 2022, arXiv:2209.06235).

``method: dino`` with one of the options that solo-learn's own lacks, such as ``n_classes``. What solo-learn's has not:
one hidden layer, unit rows before the bottleneck, batch statistics of both views together, a teacher whose head begins
at random, and a centre that moves after each view.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from plugins.checks import compute_dtype
from plugins.distributed import Collective
from plugins.heads import SharedHead, issl_head, issl_init_
from plugins.linalg import joined_mean
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from solo_ext.method import TeacherMethod


class DINOTerms(NamedTuple):
    """In nats. Only ``loss`` has a gradient."""

    loss: Tensor
    H_Mlz: Tensor
    """Mean entropy of the teacher's assignments."""


class DINOLoss(nn.Module):
    """Mean over both orders of two views of the cross-entropy of the teacher's assignments and the student's.

    ``H(softmax((t − c) / τ_t), softmax(s / τ_s))``, with the centre ``c ← m c + (1 − m) mean(t)`` after each order. The
    batch is that of all processes.

    Args:
        options: of SPEC.
        comm: the processes that share a batch.
    """

    center: Tensor

    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(options["n_classes"]))
        self.options, self.comm = options, comm
        self.epoch = 0
        """That of the training, for the teacher's temperature."""

    @property
    def teacher_temperature(self) -> float:
        """τ_t of the epoch: equal steps from its first value, in the first epoch, to its last."""
        first, last = self.options["warmup_teacher_temperature"], self.options["teacher_temperature"]
        epochs = self.options["warmup_teacher_temperature_epochs"]
        if self.epoch >= epochs:
            return last
        return first + (last - first) * self.epoch / max(epochs - 1, 1)

    def forward(self, e: Embeddings) -> DINOTerms:
        """Both orders; in training each moves the centre."""
        pairs = [self._pair(e.z[student], e.target[1 - student]) for student in (0, 1)]
        return DINOTerms(*(sum(terms) / 2 for terms in zip(*pairs, strict=True)))

    def _pair(self, student: Tensor, teacher: Tensor) -> DINOTerms:
        dtype = compute_dtype(student.dtype)
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = student.to(dtype), teacher.detach().to(dtype)
            log_p = ((teacher - self.center) / self.teacher_temperature).log_softmax(1)
            p = log_p.exp()
            log_q = (student / self.options["student_temperature"]).log_softmax(1)
            terms = DINOTerms(joined_mean(-(p * log_q).sum(1), self.comm), joined_mean(-(p * log_p).sum(1), self.comm))
            if self.training:
                self._move_center(teacher)
        return terms

    @torch.no_grad()
    def _move_center(self, teacher: Tensor) -> None:
        rows = teacher.new_full((1,), len(teacher))
        sums = self.comm.sum(torch.cat([teacher.sum(0), rows]))
        self.center.lerp_((sums[:-1] / sums[-1]).to(self.center), 1 - self.options["center_momentum"])


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    layers = {"layers": 1, "hidden_dim": options["proj_hidden_dim"], "activation": "gelu", "last": "cosine"}
    rank = {"bottleneck": options["proj_output_dim"], "bottleneck_norm": False}
    return SharedHead(*issl_head(features_dim, options["n_classes"], **layers, **rank))


SPEC = MethodSpec(
    name="dino",
    loss=DINOLoss,
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
        "warmup_teacher_temperature": Option(0.04, "the same in the first epoch, > 0", low=1e-6),
        "warmup_teacher_temperature_epochs": Option(50, "epochs from the one to the other, >= 0", low=0),
        "center_momentum": Option(0.9, "what is kept of the centre, in [0, 1]", low=0, high=1),
        "freeze_last_layer": Option(1, "epochs in which the last layer stays as it is, >= 0", low=0),
    },
    paper=Paper("DINO", "Caron et al. 2021, arXiv:2104.14294, as in Dubois et al. 2022, arXiv:2209.06235"),
    width="n_classes",
)


class PublishedDINO(TeacherMethod):
    """The method of SPEC."""

    spec = SPEC

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        issl_init_(self.momentum_projector)  # no copy of the student's

    def on_train_epoch_start(self) -> None:
        """Set the teacher's temperature."""
        super().on_train_epoch_start()
        self.objective.criterion.epoch = self.current_epoch

    def on_after_backward(self) -> None:
        """In the first epochs the last layer gets no gradient."""
        super().on_after_backward()
        if self.current_epoch < self.options["freeze_last_layer"]:
            self.projector[-1].weight.grad = None
