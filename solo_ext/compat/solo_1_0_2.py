"""solo-learn 1.0.2 (2021) on today's PyTorch and Lightning, with the interface of solo-learn's main branch.

No installed file is edited and no class of solo-learn is changed. What is mended, and where it broke:

* ``methods/base.py:28`` imports pl_bolts, which no current Python can install: a module of that name has our schedule.
* ``methods/base.py:519,806``: Lightning 2 refuses a module that has ``validation_epoch_end``: hidden, replaced.
* ``methods/base.py:745``: ``on_train_batch_end`` wants an argument that Lightning 2 no longer gives: replaced.
* ``methods/base.py`` ``configure_optimizers``: LARSWrapper and partial(static_lr), see ``optim``: replaced.
* ``methods/base.py:744``: the teacher's momentum starts anew after a resume: computed from the step.
* ``utils/knn.py`` wants ``compute_on_step``, which torchmetrics dropped: ours is used.
* every method takes keywords, and keeps its defaults in an argument parser: translated from ``cfg``.
* ``encoder`` is stored as ``backbone``, so that checkpoints carry the keys of main.
"""

import inspect
import sys
from argparse import ArgumentParser
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.targets import cosine_tau
from solo_ext.compat.optim import OPTIMIZERS, WarmupCosineLR
from solo_ext.errors import UserError
from solo_ext.knn import WeightedKNNClassifier


def _provide_pl_bolts() -> None:
    """Put a module pl_bolts.optimizers.lr_scheduler where ``import`` finds it, unless one is loaded already."""
    if "pl_bolts" in sys.modules:
        return
    names = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")
    modules = [ModuleType(name, "Stands in for lightning-bolts, for solo-learn 1.0.2.") for name in names]
    modules[0].optimizers = modules[1]
    modules[1].lr_scheduler = modules[2]
    modules[2].LinearWarmupCosineAnnealingLR = WarmupCosineLR
    sys.modules.update(zip(names, modules, strict=True))


_provide_pl_bolts()

import pytorch_lightning as pl  # noqa: E402
import solo.methods  # noqa: E402
import solo.utils.pretrain_dataloader as host_data  # noqa: E402, F401  (for our callers)
from solo.methods.base import BaseMethod as _HostBase  # noqa: E402
from solo.methods.base import BaseMomentumMethod as _HostMomentumBase  # noqa: E402
from solo.methods.linear import LinearModel as _HostLinear  # noqa: E402
from solo.utils.metrics import accuracy_at_k, weighted_mean  # noqa: E402

_RENAMED = {"encoder": "backbone", "momentum_encoder": "momentum_backbone"}
_NOT_METHODS = ("base", "linear")


class MainInterface:
    """What main's BaseMethod offers, laid over a class of 1.0.2. First in the order of resolution."""

    validation_epoch_end = None  # Lightning 2 refuses a module on which this can be called

    def __init__(self, cfg: DictConfig) -> None:
        cfg = self.add_and_assert_specific_cfg(cfg)
        super().__init__(**_keywords(cfg, type(self)))
        self.cfg = cfg
        self.scheduler_interval = cfg.scheduler.interval
        self.exclude_bias_n_norm_wd = cfg.optimizer.exclude_bias_n_norm_wd
        self.knn_eval = cfg.knn_eval.enabled
        if self.knn_eval:
            self.knn = WeightedKNNClassifier(k=cfg.knn_eval.k, distance_fx=cfg.knn_eval.distance_func)
        self.validation_step_outputs: list[dict[str, Any]] = []

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fill in what a configuration may leave out; the values are main's."""
        defaults = {
            "backbone": {"kwargs": {}},
            "optimizer": {"exclude_bias_n_norm_wd": False, "kwargs": {}},
            "accumulate_grad_batches": 1,
            "scheduler": {
                "lr_decay_steps": None,
                "min_lr": 0.0,
                "warmup_start_lr": 3e-5,
                "warmup_epochs": 10,
                "interval": "step",
            },
            "knn_eval": {"enabled": False, "k": 20, "distance_func": "euclidean"},
            "performance": {"disable_channel_last": False},
            "method_kwargs": {},
            "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": False},
        }
        return OmegaConf.merge(defaults, cfg)

    # the encoder is called backbone

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_RENAMED.get(name, name), value)

    @property
    def encoder(self) -> torch.nn.Module:
        """1.0.2's name of the backbone."""
        return self.backbone

    @property
    def momentum_encoder(self) -> torch.nn.Module:
        """1.0.2's name of the teacher's backbone."""
        return self.momentum_backbone

    # training

    def _base_shared_step(self, X: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        """Classification of one view; the loss of a batch without any label is 0, where solo-learn's is NaN."""
        out = super()._base_shared_step(X, targets)
        summed = torch.nn.functional.cross_entropy(out["logits"], targets, ignore_index=-1, reduction="sum")
        out["loss"] = summed / (targets != -1).sum().clamp(min=1)
        return out

    def on_train_epoch_start(self) -> None:
        """Forget the k-NN features of an epoch after which nothing was validated."""
        super().on_train_epoch_start()
        if self.knn_eval:
            self.knn.reset()

    # optimiser and schedule

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule as main builds them from ``cfg.optimizer`` and ``cfg.scheduler``."""
        groups = self.learnable_params
        if self.exclude_bias_n_norm_wd:
            groups = _without_decay_of_vectors(groups)
        static = [index for index, group in enumerate(groups) if group.pop("static_lr", False)]
        optimizer = _optimizer(self, groups)
        return with_schedule(
            self, optimizer, self.cfg.scheduler, static={index: groups[index].get("lr", self.lr) for index in static}
        )

    # validation

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Classify one batch with the online classifiers, and hand its features to the k-NN classifier."""
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
        """Log the means over all validation images, and the k-NN accuracy."""
        outputs = self.validation_step_outputs
        names = [name for name in outputs[0] if name != "batch_size"]
        log = {name: weighted_mean(outputs, name, "batch_size") for name in names}
        if self.knn_eval and not self.trainer.sanity_checking:
            log["val_knn_acc1"], log["val_knn_acc5"] = self.knn.compute()
        self.log_dict(log, sync_dist=True)
        outputs.clear()


class BaseMethod(MainInterface, _HostBase):
    """Main's BaseMethod."""


class MomentumInterface(MainInterface):
    """What main's BaseMomentumMethod offers beside."""

    def on_train_start(self) -> None:
        """Take up the teacher's schedule where a resumed run stands."""
        self.last_step = self.trainer.global_step
        self._set_tau()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the teacher after each step of the optimiser; the first time with the base momentum."""
        if self.trainer.global_step > self.last_step:
            for online, momentum in self.momentum_pairs:
                self.momentum_updater.update(online, momentum)
            self.log("tau", self.momentum_updater.cur_tau, on_step=False, on_epoch=True)
            self._set_tau()
        self.last_step = self.trainer.global_step

    def _set_tau(self) -> None:
        updater = self.momentum_updater
        total = max(int(self.trainer.estimated_stepping_batches), 1)
        step = min(self.trainer.global_step, total)
        updater.cur_tau = cosine_tau(step, total, updater.base_tau, updater.final_tau)


class BaseMomentumMethod(MomentumInterface, _HostMomentumBase):
    """Main's BaseMomentumMethod."""


class LinearModel(_HostLinear):
    """Main's LinearModel: a classifier on a backbone that is frozen, or fine-tuned with ``cfg.finetune``.

    Args:
        backbone: images → features, with ``inplanes`` or ``num_features``.
        cfg: main's configuration of a linear evaluation, complete.
    """

    validation_epoch_end = None

    def __init__(self, backbone: torch.nn.Module, cfg: DictConfig) -> None:
        super().__init__(
            backbone=backbone,
            num_classes=cfg.data.num_classes,
            max_epochs=cfg.max_epochs,
            batch_size=cfg.optimizer.batch_size,
            optimizer="sgd",
            lars=False,
            lr=cfg.optimizer.lr,
            weight_decay=cfg.optimizer.weight_decay,
            exclude_bias_n_norm=False,
            extra_optimizer_args={},
            scheduler=cfg.scheduler.name,
            lr_decay_steps=cfg.scheduler.lr_decay_steps,
        )
        self.cfg = cfg
        self.finetune = cfg.finetune
        if self.finetune:
            backbone.requires_grad_(True)
        self.validation_step_outputs: list[dict[str, Any]] = []

    def configure_optimizers(self) -> Any:
        """Optimiser and schedule as main builds them."""
        trained = self if self.finetune else self.classifier
        groups = [{"params": list(trained.parameters())}]
        if self.cfg.optimizer.exclude_bias_n_norm_wd:
            groups = _without_decay_of_vectors(groups)
        optimizer = _optimizer(self, groups)
        return with_schedule(self, optimizer, self.cfg.scheduler, static={})

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images ``[B, 3, H, W]`` → features and logits."""
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            feats = self.backbone(X)
        return {"logits": self.classifier(feats), "feats": feats}

    def shared_step(self, batch: Any, batch_idx: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Batch size, loss and accuracies of one batch."""
        images, targets = batch
        logits = self(images)["logits"]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        acc1, acc5 = accuracy_at_k(logits, targets, top_k=(1, min(5, logits.shape[1])))
        return images.shape[0], loss, acc1, acc5

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """One step; a frozen backbone stays in evaluation mode."""
        self.backbone.train(self.finetune)
        _, loss, acc1, acc5 = self.shared_step(batch, batch_idx)
        self.log_dict({"train_loss": loss, "train_acc1": acc1, "train_acc5": acc5}, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Classify one batch."""
        metrics = super().validation_step(batch, batch_idx)
        self.validation_step_outputs.append(metrics)
        return metrics

    def on_validation_epoch_end(self) -> None:
        """Log the means over all validation images."""
        outputs = self.validation_step_outputs
        names = ("val_loss", "val_acc1", "val_acc5")
        self.log_dict({name: weighted_mean(outputs, name, "batch_size") for name in names}, sync_dist=True)
        outputs.clear()


def _optimizer(module: pl.LightningModule, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser that ``cfg.optimizer`` names; Adam in its fused form unless told otherwise."""
    cfg = module.cfg.optimizer
    options = OmegaConf.to_container(cfg.kwargs)
    if cfg.name in ("adam", "adamw"):
        options.setdefault("fused", True)
    return OPTIMIZERS[cfg.name](groups, lr=module.lr, weight_decay=module.weight_decay, **options)


def with_schedule(
    module: pl.LightningModule, optimizer: torch.optim.Optimizer, cfg: DictConfig, static: dict[int, float]
) -> Any:
    """What ``configure_optimizers`` returns: the optimiser with the schedule that ``cfg`` names.

    Args:
        module: the module that trains, for the number of steps.
        optimizer: what is scheduled.
        cfg: ``cfg.scheduler``.
        static: {index of a parameter group: its constant rate}.
    """
    if cfg.name == "none":
        return optimizer
    if cfg.name == "step":
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, list(cfg.lr_decay_steps), gamma=0.1)]
    epochs = module.max_epochs
    steps = module.trainer.estimated_stepping_batches if cfg.interval == "step" else epochs
    schedule = WarmupCosineLR(
        optimizer,
        warmup_steps=cfg.warmup_epochs * steps / max(epochs, 1),
        total_steps=steps,
        start_lr=getattr(module, "warmup_start_lr", cfg.warmup_start_lr),
        end_lr=getattr(module, "min_lr", cfg.min_lr),
        static=static,
    )
    return [optimizer], [{"scheduler": schedule, "interval": cfg.interval, "frequency": 1}]


def _without_decay_of_vectors(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split each group into matrices, which keep its weight decay, and vectors, which get none."""
    split = []
    for group in groups:
        rest = {key: value for key, value in group.items() if key != "params"}
        parameters = list(group["params"])
        matrices = [p for p in parameters if p.ndim > 1]
        vectors = [p for p in parameters if p.ndim <= 1]
        split += [{**rest, "params": matrices}] if matrices else []
        split += [{**rest, "params": vectors, "weight_decay": 0}] if vectors else []
    return split


def _keywords(cfg: DictConfig, cls: type) -> dict[str, Any]:
    """Main's configuration as the keywords of a constructor of 1.0.2."""
    backbone = OmegaConf.to_container(cfg.backbone.kwargs)
    if cfg.backbone.name not in _HostBase._SUPPORTED_ENCODERS:
        known = ", ".join(_HostBase._SUPPORTED_ENCODERS)
        raise UserError(f"solo-learn 1.0.2 has no backbone {cfg.backbone.name!r}; it has {known}")
    if cfg.data.dataset in ("cifar10", "cifar100"):
        backbone["cifar"] = True
    if cfg.backbone.name.startswith(("vit", "swin")):
        backbone.setdefault("img_size", cfg.augmentations[0].crop_size)
    keywords = {
        "encoder": cfg.backbone.name,
        "num_classes": cfg.data.num_classes,
        "backbone_args": backbone,
        "max_epochs": cfg.max_epochs,
        "batch_size": cfg.optimizer.batch_size,
        # optimiser and k-NN classifier are made by MainInterface, these only have to be accepted
        "optimizer": "sgd",
        "lars": False,
        "exclude_bias_n_norm": False,
        "extra_optimizer_args": {},
        "knn_eval": False,
        "lr": cfg.optimizer.lr,
        "weight_decay": cfg.optimizer.weight_decay,
        "classifier_lr": cfg.optimizer.classifier_lr,
        "accumulate_grad_batches": cfg.accumulate_grad_batches,
        "scheduler": cfg.scheduler.name,
        "min_lr": cfg.scheduler.min_lr,
        "warmup_start_lr": cfg.scheduler.warmup_start_lr,
        "warmup_epochs": cfg.scheduler.warmup_epochs,
        "lr_decay_steps": cfg.scheduler.lr_decay_steps,
        "num_large_crops": cfg.data.num_large_crops,
        "num_small_crops": cfg.data.num_small_crops,
    }
    if issubclass(cls, _HostMomentumBase):
        keywords["base_tau_momentum"] = cfg.momentum.base_tau
        keywords["final_tau_momentum"] = cfg.momentum.final_tau
        keywords["momentum_classifier"] = cfg.momentum.classifier
    if getattr(cls, "native", False):
        given = OmegaConf.to_container(cfg.method_kwargs)
        own = {key: value for key, value in given.items() if key in _parameters(cls)}
        keywords.update({**_parser_defaults(cls), **own})
    return keywords


def _parameters(cls: type) -> dict[str, Any]:
    """The constructor's own keywords of a native method, those of the base classes left out."""
    return {
        name: parameter
        for base in cls.__mro__
        if base.__module__.startswith("solo.methods.") and base not in (_HostBase, _HostMomentumBase)
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }


def _parser_defaults(cls: type) -> dict[str, Any]:
    """Defaults of a native method's own keywords: 1.0.2 keeps them in its argument parser."""
    parser = cls.add_model_specific_args(ArgumentParser(add_help=False))
    return {action.dest: action.default for action in parser._actions if action.dest in _parameters(cls)}


@lru_cache(maxsize=1)
def native_methods() -> dict[str, type]:
    """solo-learn's own methods by name, each built from a ``cfg``."""
    natives = {}
    for name, cls in solo.methods.METHODS.items():
        if name in _NOT_METHODS or not issubclass(cls, _HostBase) or issubclass(cls, MainInterface):
            continue
        interface = MomentumInterface if issubclass(cls, _HostMomentumBase) else MainInterface
        natives[name] = type(cls.__name__, (interface, cls), {"native": True, "__module__": __name__})
    return natives


_IGNORED_BY_MAIN = {"simsiam": {"temperature"}}
"""Options that main's own YAML files give and main itself never reads."""


def native_options(name: str) -> frozenset[str]:
    """The ``method_kwargs`` that a native method takes."""
    return frozenset({*_parameters(native_methods()[name]), *_IGNORED_BY_MAIN.get(name, ())})
