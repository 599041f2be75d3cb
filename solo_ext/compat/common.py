"""Mixins that correct errors of solo-learn's base classes and give both generations the same behaviour.

Corrected errors, with their location in main (m) and in 1.0.2 (o):

* ``configure_optimizers`` (m base.py, linear.py; o base.py): ``partial(static_lr)`` and, in 1.0.2, LARSWrapper cannot
  be loaded safely from a checkpoint. Our schedule stores plain numbers.
* ``on_train_start`` (m base.py:748; o base.py:744): a resumed run restarted the schedule of the teacher's momentum.
* ``_base_shared_step``: the loss of a batch without labels was NaN.
* ``_shared_step_momentum``: it raised an error with fewer than five classes.
* ``on_validation_epoch_end``: the mean over processes ignored their numbers of images.
* ``on_train_start`` of SwAV and DeepClusterV2: it creates buffers, so that a checkpoint with these buffers could not be
  loaded.
* ``LinearModel``: the same errors.
* ``methods/deepclusterv2.py``: the loss of the first epoch, before there are clusters, was NaN with a zero gradient.
"""

import math
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from plugins.heads import normalized_classifier
from plugins.targets import cosine_tau
from plugins.tools.command import UserError, did_you_mean
from plugins.tools.trainer import run_steps
from solo_ext.architectures import ARCHITECTURES, set_stem_
from solo_ext.compat.optim import OPTIMIZERS, EpochWarmupLR, WarmupCosineLR
from solo_ext.schema import Pretrain, defaults

_METHOD_ENTRIES = (
    *("backbone", "optimizer", "accumulate_grad_batches", "accumulate", "scheduler", "knn_eval", "performance"),
    *("method_kwargs", "momentum"),
)
METHOD_DEFAULTS: dict[str, Any] = {key: value for key, value in defaults(Pretrain).items() if key in _METHOD_ENTRIES}
"""The optional entries of the configuration that a method reads, with main's defaults."""

CHECKOUT = "SOLO_LEARN_CHECKOUT"
"""Environment variable that names the folder of a checkout of solo-learn's main branch."""

CIFAR_STEM = ("cifar10", "cifar100")
"""Datasets for which solo-learn replaces the first layers of a ResNet."""

IGNORED_OPTIONS = {
    "ressl": {"base_tau_momentum", "final_tau_momentum", "momentum_classifier"},
    "simsiam": {"temperature"},
}
"""Options of native methods in main's own YAML files that main never reads."""

LATE_BUFFERS = ("queue", "local_memory_index", "local_memory_embeddings")
"""Buffers that SwAV and DeepClusterV2 create only when training starts."""


def fill_defaults(cfg: DictConfig) -> DictConfig:
    """Return the configuration with METHOD_DEFAULTS for the entries that are missing."""
    cfg = OmegaConf.merge(METHOD_DEFAULTS, cfg)
    if cfg.backbone.name in ARCHITECTURES:
        # solo-learn replaces the stem of its own networks; our networks have an argument for it
        cfg.backbone.kwargs.setdefault("cifar", cfg.data.dataset in CIFAR_STEM)
    return cfg


class MethodMixin:
    """Corrections of solo-learn's BaseMethod. The mixin must come first in the method resolution order."""

    _late_buffers: ClassVar[dict[str, Tensor]] = {}

    def set_stem(self, stem: str | None) -> None:
        """Replace the first layers of the backbone, which solo-learn's classes choose themselves, and of the teacher's.

        Args:
            stem: of :func:`solo_ext.architectures.set_stem_`; None keeps those of solo-learn.

        Raises:
            UserError: the backbone has no such stem.
        """
        if stem is None:
            return
        try:
            set_stem_(self.backbone, stem)
        except TypeError as error:
            raise UserError(f"backbone.kwargs: {error}") from None
        teacher = getattr(self, "momentum_backbone", None)
        if teacher is not None:
            set_stem_(teacher, stem).load_state_dict(self.backbone.state_dict())
            teacher.requires_grad_(False)

    def _base_shared_step(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        """Classify one view; the loss of a batch without labels is 0."""
        out = super()._base_shared_step(X, targets)
        out["loss"] = _labelled_cross_entropy(out["logits"], targets)
        return out

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Move the buffers that do not exist yet out of the state dict, until training starts."""
        super().on_load_checkpoint(checkpoint)
        state, existing = checkpoint["state_dict"], dict(self.named_buffers())
        self._late_buffers = {name: state.pop(name) for name in LATE_BUFFERS if name in state and name not in existing}

    def on_train_start(self) -> None:
        """Restore the buffers that ``on_load_checkpoint`` kept, unless the number of processes has changed."""
        super().on_train_start()
        for name, value in self._late_buffers.items():
            if self.get_buffer(name).shape == value.shape:
                self.get_buffer(name).copy_(value)

    def on_train_epoch_start(self) -> None:
        """Remove the k-NN features of an epoch without validation, and seed the initial clusters."""
        with torch.random.fork_rng(devices=[]):
            # DeepClusterV2 draws its initial clusters here, and a resumed run must draw the same
            torch.default_generator.manual_seed(self.current_epoch)
            super().on_train_epoch_start()
        if self.knn_eval:
            self.knn.reset()

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule from ``cfg.optimizer`` and ``cfg.scheduler``, as main does."""
        groups = self.learnable_params
        if self.cfg.optimizer.exclude_bias_n_norm_wd:
            groups = _without_decay_of_vectors(groups)
        static = [index for index, group in enumerate(groups) if group.pop("static_lr", False)]
        optimizer = _optimizer(self, groups)
        return with_schedule(
            self, optimizer, self.cfg.scheduler, static={index: groups[index].get("lr", self.lr) for index in static}
        )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Classify a batch with the online classifiers, and pass its features to the k-NN classifier."""
        images, targets = batch
        out = self._base_shared_step(images, targets)
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn(test_features=out["feats"].detach(), test_targets=targets.detach())
        metrics = {"batch_size": targets.size(0)}
        metrics.update({f"val_{name}": out[name] for name in ("loss", "acc1", "acc5")})
        if getattr(self, "momentum_classifier", None) is not None:
            out = self._shared_step_momentum(images, targets)
            metrics.update({f"momentum_val_{name}": out[name] for name in ("loss", "acc1", "acc5")})
        self.validation_step_outputs.append(metrics)
        return metrics

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation images of all processes, and the k-NN accuracy."""
        log = mean_over_images(self)
        if self.knn_eval and not self.trainer.sanity_checking:
            log["val_knn_acc1"], log["val_knn_acc5"] = self.knn.compute()
        self.log_dict(log)


class MomentumMixin(MethodMixin):
    """Corrections of solo-learn's BaseMomentumMethod."""

    def on_train_start(self) -> None:
        """Set the teacher's momentum to that of the current step, also after a resume."""
        super().on_train_start()
        self.last_step = self.trainer.global_step
        self._set_tau()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the teacher after each step of the optimiser; the first update uses the base momentum."""
        if self.trainer.global_step > self.last_step:
            self.after_optimizer_step()
            self.log("tau", self.momentum_updater.cur_tau, on_step=False, on_epoch=True)
            self._set_tau()
        self.last_step = self.trainer.global_step

    def after_optimizer_step(self) -> None:
        """Update the teacher. A class that has done so in ``optimizer_step`` overrides this."""
        self.update_teacher()

    def update_teacher(self) -> None:
        """Update the teacher as solo-learn does."""
        for online, momentum in self.momentum_pairs:
            self.momentum_updater.update(online, momentum)

    def _set_tau(self) -> None:
        updater = self.momentum_updater
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        step = min(self.trainer.global_step, total)
        updater.cur_tau = cosine_tau(step, total, updater.base_tau, updater.final_tau)

    def _shared_step_momentum(self, X: Tensor, targets: Tensor) -> dict[str, Any]:
        """Compute the teacher's features of one view and, with ``momentum.classifier``, classify them."""
        out = self.momentum_forward(X)
        if self.momentum_classifier is not None:
            logits = self.momentum_classifier(out["feats"])
            acc1, acc5 = self.accuracy_at_k(logits, targets, top_k=(1, min(5, logits.shape[1])))
            loss = _labelled_cross_entropy(logits, targets)
            out.update({"logits": logits, "loss": loss, "acc1": acc1, "acc5": acc5})
        return out


class LinearMixin:
    """solo-learn's LinearModel: a classifier on a backbone that is frozen, or fine-tuned with ``cfg.finetune``.

    With ``cfg.normalized_classifier`` the classifier is :func:`plugins.heads.normalized_classifier`.

    Args:
        backbone: maps images to features, and has ``inplanes`` or ``num_features``.
        cfg: the complete configuration of a linear evaluation.
        loss_func: training loss of logits and targets; None means cross-entropy.
        mixup_func: maps (images, targets) of a training batch to (images, soft targets), or None.
    """

    def __init__(self, backbone: nn.Module, cfg: DictConfig, loss_func: Any = None, mixup_func: Any = None) -> None:
        super().__init__(backbone, cfg)
        self.cfg = cfg
        self.finetune = cfg.finetune
        self.loss_func = loss_func or nn.CrossEntropyLoss()
        self.mixup_func = mixup_func
        if cfg.normalized_classifier:
            self.classifier = normalized_classifier(self.classifier.in_features, self.classifier.out_features)
        backbone.requires_grad_(self.finetune)
        self.validation_step_outputs: list[dict[str, Any]] = []

    def configure_optimizers(self) -> Any:
        """Build optimiser and schedule as main does."""
        if self.cfg.optimizer.get("layer_decay", 0.0) > 0:
            groups = self.layer_decay_groups()
        else:
            apart = self.finetune and "backbone_lr" in self.cfg.optimizer
            trained = self if self.finetune and not apart else self.classifier
            groups = [{"params": list(trained.parameters())}]
            if apart:
                groups.append({"params": list(self.backbone.parameters()), "lr": self.cfg.optimizer.backbone_lr})
        if self.cfg.optimizer.exclude_bias_n_norm_wd:
            groups = _without_decay_of_vectors(groups)
        optimizer = _optimizer(self, groups)
        return with_schedule(self, optimizer, self.cfg.scheduler, static={})

    def forward(self, X: Tensor) -> dict[str, Tensor]:
        """Compute features and logits of images ``[B, 3, H, W]``."""
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            feats = self.backbone(X)
        return {"logits": self.classifier(feats), "feats": feats}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch; a frozen backbone stays in evaluation mode."""
        self.backbone.train(self.finetune)
        images, targets = batch
        if self.mixup_func is not None:
            images, mixed = self.mixup_func(images, targets)
            loss = self.loss_func(self(images)["logits"], mixed)
            self.log("train_loss", loss, on_epoch=True, sync_dist=True)
            return loss
        logits = self(images)["logits"]
        loss = self.loss_func(logits, targets)
        acc1, acc5 = self.accuracies(logits, targets)
        self.log_dict({"train_loss": loss, "train_acc1": acc1, "train_acc5": acc5}, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Classify a batch."""
        images, targets = batch
        logits = self(images)["logits"]
        acc1, acc5 = self.accuracies(logits, targets)
        metrics = {"val_loss": F.cross_entropy(logits, targets), "val_acc1": acc1, "val_acc5": acc5}
        self.validation_step_outputs.append({"batch_size": images.shape[0], **metrics})
        return metrics

    def accuracies(self, logits: Tensor, targets: Tensor) -> list[Tensor]:
        """Compute the top-1 and the top-5 accuracy in per cent; top-k with fewer than five classes."""
        return self.accuracy_at_k(logits, targets, top_k=(1, min(5, logits.shape[1])))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation images of all processes."""
        self.log_dict(mean_over_images(self))


def mean_over_images(module: Any) -> dict[str, Tensor]:
    """Return the means of ``validation_step_outputs`` over the images of all processes, and clear the list."""
    outputs = module.validation_step_outputs
    names = [name for name in outputs[0] if name != "batch_size"]
    rows = torch.tensor([out["batch_size"] for out in outputs], dtype=torch.float64, device=module.device)
    values = [torch.stack([torch.as_tensor(out[name]).reshape(()) for out in outputs]) for name in names]
    sums = torch.stack([*((value.to(rows) * rows).sum() for value in values), rows.sum()])
    outputs.clear()
    sums = module.trainer.strategy.reduce(sums, reduce_op="sum")
    return {name: value.float() for name, value in zip(names, sums[:-1] / sums[-1], strict=True)}


def _labelled_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labelled rows; 0 if there are none."""
    summed = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return summed / (targets != -1).sum().clamp(min=1)


def _optimizer(module: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build the optimiser of ``cfg.optimizer``; Adam and AdamW are fused by default."""
    cfg = module.cfg.optimizer
    options = OmegaConf.to_container(cfg.kwargs)
    if cfg.name in ("adam", "adamw"):
        options.setdefault("fused", True)
    return OPTIMIZERS[cfg.name](groups, lr=module.lr, weight_decay=module.weight_decay, **options)


def with_schedule(module: Any, optimizer: torch.optim.Optimizer, cfg: DictConfig, static: dict[int, float]) -> Any:
    """Return optimiser and schedule in the form of ``configure_optimizers``.

    Args:
        module: the module to train, for the number of steps.
        optimizer: the optimiser.
        cfg: ``cfg.scheduler``.
        static: {index of a parameter group: its constant learning rate}.
    """
    if cfg.name == "none":
        return optimizer
    if cfg.name == "step":
        steps = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(cfg.lr_decay_steps), gamma=cfg.get("lr_decay_factor", 0.1)
        )
        return [optimizer], [steps, *_linear_warmup(optimizer, cfg.get("warmup_steps", 0))]
    if cfg.name == "exponential":  # main uses the weight decay as gamma
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, cfg.gamma)]
    if cfg.name == "reduce":  # main names no quantity, without which Lightning does not train
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=cfg.factor, patience=cfg.patience)
        return [optimizer], [{"scheduler": plateau, "interval": "epoch", "frequency": 1, "monitor": "train_loss"}]
    steps, steps_per_epoch = run_steps(module.trainer)
    if cfg.name == "ssv":
        schedule: Any = EpochWarmupLR(
            optimizer,
            cfg.warmup_epochs,
            math.ceil(steps / max(steps_per_epoch or 1, 1)),
            decay=cfg.get("decay", "cosine"),
            milestones=list(cfg.lr_decay_steps or ()),
            factor=cfg.lr_decay_factor,
            static=static,
        )
        return [optimizer], [{"scheduler": schedule, "interval": "epoch", "frequency": 1}]
    if steps_per_epoch is None:
        raise UserError("scheduler.name=warmup_cosine needs data of a known length; use scheduler.name=none")
    by_step = cfg.interval == "step"
    schedule = WarmupCosineLR(
        optimizer,
        warmup_steps=cfg.warmup_epochs * (steps_per_epoch if by_step else 1),
        total_steps=steps if by_step else math.ceil(steps / max(steps_per_epoch, 1)),
        start_lr=getattr(module, "warmup_start_lr", cfg.warmup_start_lr),
        end_lr=getattr(module, "min_lr", cfg.min_lr),
        static=static,
    )
    return [optimizer], [{"scheduler": schedule, "interval": cfg.interval, "frequency": 1}]


def _linear_warmup(optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, Any]]:
    """Return the schedule whose factor is (k + 1) / ``steps`` in step k, and 1 from the end of the warm-up."""
    if steps < 2:
        return []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / steps, 1.0, steps - 1)
    return [{"scheduler": schedule, "interval": "step", "frequency": 1}]


def _without_decay_of_vectors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each parameter group into matrices, with weight decay, and vectors, without weight decay."""
    split = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        parameters = list(group["params"])
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        split += [{**rest, "params": matrices}] if matrices else []
        if vectors and "name" in rest:  # Lightning logs the learning rate of each group under its name
            rest["name"] += "_no_decay"
        split += [{**rest, "params": vectors, "weight_decay": 0}] if vectors else []
    return split


def host_classes(cls: type) -> list[type]:
    """Return the classes of solo-learn in the hierarchy of a native method, without those of ``solo.methods.base``."""
    return [
        base
        for base in cls.__mro__
        if base.__module__.startswith("solo.methods.") and base.__module__ != "solo.methods.base"
    ]


def unknown_backbone_error(name: str, known: list[str]) -> UserError:
    """Return the error for an unknown backbone."""
    near = did_you_mean(name, known)
    return UserError(f"unknown backbone {name!r}; this version of solo-learn has: {', '.join(sorted(known))}{near}")


def needs_main_error(what: str, release: str) -> UserError:
    """Return the error for a feature of solo-learn's main branch that this release lacks."""
    return UserError(
        f"{what} needs solo-learn's main branch, but this is solo-learn {release}; "
        f"set {CHECKOUT} to the folder of a checkout of main"
    )


def zero_before_clusters(loss: Any) -> Any:
    """Wrap DeepClusterV2's loss so that it is 0, without a gradient, while no image belongs to a cluster."""

    @wraps(loss)
    def corrected(outputs: Tensor, assignments: Tensor, temperature: float = 0.1) -> Tensor:
        value = loss(outputs, assignments, temperature)
        return value.where((assignments != -1).any(), torch.zeros_like(value))

    return corrected
