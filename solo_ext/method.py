"""The generic adapter: any MethodSpec as a method of solo-learn.

What is a method's own stands in its SPEC and, where solo-learn needs more than a SPEC says, in ``overrides``.
Checkpoints carry solo-learn's keys: backbone, projector, predictor, momentum_backbone, momentum_projector.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from plugins.distributed import WORLD
from plugins.linalg import participation_ratio
from plugins.predictors import ClosedFormPredictor, RunningMoment
from plugins.spec import Embeddings, MethodSpec
from solo_ext.compat import BaseMethod, BaseMomentumMethod

_PREDICTING = ("byol", "directcopy", "directpred", "isocopy", "isoloss", "simsiam")
LOSS_NAMES = {**dict.fromkeys(_PREDICTING, "train_neg_cos_sim"), "ssl_ey": "train_ssley_loss"}
"""The name under which solo-learn, or the fork that a method comes from, logs the loss that we call train_ssl_loss."""


class PluginMethod:
    """The training step that all methods share; mixed into solo-learn's base classes below.

    It logs, each with ``_step`` and ``_epoch`` appended by Lightning:

    * ``train_ssl_loss``, and the same under the name of LOSS_NAMES. ``train_neg_cos_sim`` is a sum of distances
      (2 - 2 cos, or squared Euclidean) over both orders of the views, as in solo-learn; also for IsoLoss.
    * ``train_<term>`` of the loss's terms, such as the mean ``train_cosine`` of prediction and target in [-1, 1].
    * ``train_z_std``, the standard deviation of the normalised embedding: 1 / sqrt(D) when it is isotropic.
    * ``eigval_metrics/eigval_{min,max,mean,std}`` and ``eigval_metrics/part_ratio`` of the embedding's second moment,
      at the steps that are written; ``_epoch`` is their mean over these and the last.
    * solo-learn's own: ``train_class_loss`` (over labelled images), ``train_acc1``, ``train_acc5`` (an image without
      a label counts as wrong), ``tau``, ``val_loss``, ``val_acc1``, ``val_acc5``.
    """

    spec: ClassVar[MethodSpec]

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.options = self.spec.resolve(OmegaConf.to_container(cfg.method_kwargs))
        self.projector = self.spec.head(self.features_dim, self.options)
        self.predictor = self.spec.predictor(self.options, WORLD) if self.spec.predictor else None
        self.log_eigvals = self.options["log_eigvals"]
        if self.log_eigvals and not isinstance(self.predictor, RunningMoment):
            # a closed-form predictor follows the second moment anyway; here it is followed for the log alone
            self.embedding_moment = RunningMoment(self.options["proj_output_dim"], rho=0.99, comm=WORLD)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser."""
        heads = {"projector": self.projector, "predictor": self.predictor}
        groups = [{"name": name, "params": list(head.parameters())} for name, head in heads.items() if head is not None]
        for group in groups:
            if group["name"] == "predictor" and self.options.get("pred_lr_scale", 1.0) != 1.0:
                group["lr"] = self.lr * self.options["pred_lr_scale"]
        # a closed-form predictor has no parameters
        return super().learnable_params + [group for group in groups if group["params"]]

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Images ``[B, 3, H, W]`` → ``feats``, ``logits`` and, in evaluation, the projections ``z``."""
        out = super().forward(X)
        if not self.training:
            out["z"] = self.projector(out["feats"])
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Classification loss of the online classifier plus the method's loss on the projections of the views."""
        out = self._host_training_step(batch, batch_idx)
        z = [self.projector(feats) for feats in out["feats"]]
        p = z if self.predictor is None else self.predictor.predict(z)
        terms = self.spec.loss(Embeddings(z, p, self._targets(out, z)), self.options, WORLD)
        self._log_step(terms, z)
        return terms.loss + out["loss"]

    def _host_training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().training_step(batch, batch_idx)

    def _targets(self, out: dict[str, Any], z: list[Tensor]) -> list[Tensor]:
        return [view.detach() for view in z]

    @torch.no_grad()
    def _log_step(self, terms: Any, z: list[Tensor]) -> None:
        metrics = {"train_ssl_loss": terms.loss}
        if self.spec.name in LOSS_NAMES:
            metrics[LOSS_NAMES[self.spec.name]] = terms.loss
        metrics.update({f"train_{name}": value for name, value in terms._asdict().items() if name != "loss"})
        metrics["train_z_std"] = F.normalize(torch.stack(z), dim=-1).std(dim=1).mean()
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        if hasattr(self, "embedding_moment"):
            for view in z:
                self.embedding_moment.update(view)

    @property
    def moment(self) -> RunningMoment | None:
        """What follows the embedding's second moment, if anything does."""
        return self.predictor if isinstance(self.predictor, RunningMoment) else getattr(self, "embedding_moment", None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the statistics of the embedding's spectrum, under the names that implicit-var-reg gave them.

        Only at the steps that Lightning writes and at the last of an epoch: each value logged takes time.
        """
        super().on_train_batch_end(outputs, batch, batch_idx)
        trainer = self.trainer
        written = trainer.is_last_batch or trainer.global_step % trainer.log_every_n_steps == 0
        if self.moment is None or not written:
            return
        known = isinstance(self.predictor, ClosedFormPredictor)
        spectrum = self.predictor.eigenvalues if known else self.moment.spectrum()
        metrics = {
            "eigval_min": spectrum.min(),
            "eigval_max": spectrum.max(),
            "eigval_mean": spectrum.mean(),
            "eigval_std": spectrum.std(),
            "part_ratio": participation_ratio(spectrum),
        }
        # the moment is the same on all processes: nothing to reduce
        self.log_dict({f"eigval_metrics/{name}": value for name, value in metrics.items()}, on_step=True, on_epoch=True)


class TeacherlessMethod(PluginMethod, BaseMethod):
    """A method whose targets are its own projections, or that has none."""


class TeacherMethod(PluginMethod, BaseMomentumMethod):
    """A method with an exponential-moving-average teacher.

    With ``momentum.base_tau = momentum.final_tau = 0`` the teacher is the student itself: no second forward pass.
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        self.momentum_projector: nn.Module = self.spec.head(self.features_dim, self.options)
        with torch.no_grad():
            for teacher, student in zip(self.momentum_projector.parameters(), self.projector.parameters(), strict=True):
                teacher.copy_(student)
        self.momentum_projector.requires_grad_(False)
        self.has_teacher = cfg.momentum.base_tau > 0 or cfg.momentum.final_tau > 0 or cfg.momentum.classifier

    @property
    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Student and teacher modules, of which the second follow the first."""
        return [*super().momentum_pairs, (self.projector, self.momentum_projector)]

    @torch.no_grad()
    def move_teacher(self) -> None:
        """θ_t ← τ θ_t + (1 − τ) θ in place, in a quarter of the time that new tensors take."""
        student, teacher = ([p for pair in self.momentum_pairs for p in pair[side].parameters()] for side in (0, 1))
        get_ema_multi_avg_fn(self.momentum_updater.cur_tau)(teacher, student, 0)

    def _host_training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.has_teacher:
            return super()._host_training_step(batch, batch_idx)
        # past BaseMomentumMethod, whose step makes the teacher's forward passes
        return BaseMethod.training_step(self, batch, batch_idx)

    def _targets(self, out: dict[str, Any], z: list[Tensor]) -> list[Tensor]:
        if not self.has_teacher:
            return super()._targets(out, z)
        with torch.no_grad():
            return [self.momentum_projector(feats) for feats in out["momentum_feats"]]
