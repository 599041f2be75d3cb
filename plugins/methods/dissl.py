"""DISSL: a teacher head clusters the images, a student head of the probe's form predicts the clusters (2209.06235)."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from plugins.clock import Clock
from plugins.distributed import Collective
from plugins.heads import TwoBranchHead, dissl_heads
from plugins.losses import DISSLTerms, StallAlarm, dissl_terms, dissl_warmup
from plugins.spec import Embeddings, MethodSpec, Option, Paper

KINDS = ("dissl", "dissl_mlp", "fork_dissl", "fork_dissl_linear", "fork_dissl_mlp", "fork_dissl_v2")


class _Loss(nn.Module):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__()
        self.weights = {
            "lambda_maximality": options["lambda_maximality"],
            "beta_det_inv": options["beta_det_inv"],
            "warmup_lambda": options["warmup_lambda_iter"],
            "warmup_beta": options["warmup_beta_iter"],
            "warmup_distillation": options["warmup_teacher_iter"],
        }
        self.taus = {"tau_teacher": options["tau_teacher"], "tau_student": options["tau_student"]}
        self.comm = comm
        self.counter = Clock()
        longest = max(self.weights[name] for name in ("warmup_lambda", "warmup_beta", "warmup_distillation"))
        self.alarm = StallAlarm(options["n_classes"], after=longest + options["stall_alarm_iter"])

    def forward(self, e: Embeddings) -> DISSLTerms:
        step = self.counter() + 1
        weights = dissl_warmup(step, **self.weights)
        terms = dissl_terms(e.target, e.z, **weights._asdict(), **self.taus, comm=self.comm)
        if self.training and self.counter.first:
            self.alarm(terms.H_Mlz, step)
        return terms


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    return TwoBranchHead(dissl_heads(options["heads"], features_dim, options["n_classes"]), features_dim)


SPEC = MethodSpec(
    name="dissl",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=None,
    large=2,
    options={
        "n_classes": Option(
            16384, "C pseudo-classes, >= 2", aliases={"n_equivalence_classes": None, "n_Mx": None}, low=2
        ),
        "heads": Option("dissl", "teacher and student head; linear student heads suit linear probes", choices=KINDS),
        "lambda_maximality": Option(
            2.3, "weight λ of the marginal's entropy, >= 0", aliases={"beta_pM_unif": None}, low=0
        ),
        "beta_det_inv": Option(
            0.8, "weight β of invariance and determinism, >= 0", aliases={"beta_H_MlZ": None}, low=0
        ),
        "tau_teacher": Option(
            0.5, "temperature of the assignments, > 0", aliases={"temperature_assign": None}, low=1e-6
        ),
        "tau_student": Option(1.0, "temperature of the predictions, > 0", aliases={"temperature_pred": None}, low=1e-6),
        "warmup_lambda_iter": Option(
            0, "steps in which λ goes from β + 1", aliases={"warmup_beta_unif_iter": None}, low=0
        ),
        "warmup_beta_iter": Option(0, "steps in which β goes from λ", aliases={"warmup_beta_CE_iter": None}, low=0),
        "warmup_teacher_iter": Option(0, "steps in which the distillation's weight goes from 0", low=0),
        "stall_alarm_iter": Option(
            1000, "steps after the warm-ups before a warning that the assignments are still uniform, >= 0", low=0
        ),
    },
    paper=Paper("DISSL", "Dubois, Hashimoto, Ermon and Liang 2022, arXiv:2209.06235"),
    width="n_classes",
)
