"""solo-learn 1.0.2 (2021) with current releases of PyTorch and Lightning, and the interface of the main branch.

No installed file is changed. Corrections in addition to those in ``common``, and the reasons:

* ``methods/base.py:28`` imports pl_bolts, which cannot be installed on current Python. A module of that name with our
  schedule replaces it.
* ``methods/base.py:519,806``: Lightning 2 does not accept a module with ``validation_epoch_end``. It is replaced.
* ``methods/base.py:745``: ``on_train_batch_end`` has an argument that Lightning 2 does not pass. It is replaced.
* ``methods/base.py:200``: the table of encoders is local to a constructor. Our networks are inserted when it is used.
* ``methods/dino.py:230``: ``clip_gradients`` hides Lightning's method of that name. The first argument selects one.
* ``utils/knn.py`` needs ``compute_on_step``, which torchmetrics removed. Our classifier is used.
* ``utils/whitening.py:63`` calls ``torch.cholesky``, which torch removed. Our whitening is used.
* The constructors have keyword arguments, with defaults in an argument parser. ``cfg`` is translated to them.
* ``encoder`` is stored as ``backbone``, so that checkpoints have the keys of main.
"""

import inspect
import sys
from argparse import ArgumentParser
from functools import partial
from types import ModuleType
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from solo_ext.architectures import ARCHITECTURES, pop_stem
from solo_ext.compat.common import (
    CIFAR_STEM,
    MethodMixin,
    fill_defaults,
    host_classes,
    needs_main_error,
    unknown_backbone_error,
    zero_before_clusters,
)
from solo_ext.compat.optim import WarmupCosineLR
from solo_ext.knn import WeightedKNNClassifier


def _provide_pl_bolts() -> None:
    """Insert a module pl_bolts.optimizers.lr_scheduler into ``sys.modules``, unless it is loaded already."""
    if "pl_bolts" in sys.modules:
        return
    names = ("pl_bolts", "pl_bolts.optimizers", "pl_bolts.optimizers.lr_scheduler")
    modules = [ModuleType(name, "Replacement for lightning-bolts, for solo-learn 1.0.2.") for name in names]
    modules[0].optimizers = modules[1]
    modules[1].lr_scheduler = modules[2]
    modules[2].LinearWarmupCosineAnnealingLR = WarmupCosineLR
    sys.modules.update(zip(names, modules, strict=True))


_provide_pl_bolts()

import pytorch_lightning as pl  # noqa: E402
import solo.methods.deepclusterv2 as _deepcluster  # noqa: E402
import solo.methods.wmse as _wmse  # noqa: E402
import solo.utils.pretrain_dataloader as host_data  # noqa: E402, F401  (for our callers)
from solo.methods import METHODS  # noqa: E402, F401  (for our callers)
from solo.methods.base import BaseMethod as HostBase  # noqa: E402
from solo.methods.base import BaseMomentumMethod as HostMomentumBase  # noqa: E402
from solo.methods.linear import LinearModel as _HostLinear  # noqa: E402
from solo.utils.metrics import accuracy_at_k  # noqa: E402

RELEASE = "1.0.2"
MULTICROP = ("byol", "simclr", "wmse")  # W-MSE ignores them in its loss
_RENAMED = {"encoder": "backbone", "momentum_encoder": "momentum_backbone"}
_MAIN_ONLY = ("convnext_", "poolformer_", "wide_resnet28w")  # prefixes of backbones that only main has
_MAIN_DEFAULTS = {"queue_size": 65536, "warmup_teacher_temperature_epochs": 0}  # of SwAV and DINO; all others are equal
_SUBSTITUTE = "vit_tiny"  # passed instead of one of our networks; 1.0.2 does not change its stem


_deepcluster.deepclusterv2_loss_func = zero_before_clusters(_deepcluster.deepclusterv2_loss_func)


class _Whitening(_wmse.Whitening2d):
    """W-MSE's whitening with torch.linalg (Ermolov et al. 2021, arXiv:2007.06346, §3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute L⁻¹ (x - mean) of rows ``[B, D]`` in float32, where L Lᵀ = (1 - eps) covariance + eps I."""
        with torch.autocast(x.device.type, enabled=False):
            centred = x.float() - x.float().mean(0)
            covariance = centred.T @ centred / (len(x) - 1)
            eye = torch.eye(x.shape[1], device=x.device)
            lower = torch.linalg.cholesky((1 - self.eps) * covariance + self.eps * eye)
            return torch.linalg.solve_triangular(lower, centred.T, upper=False).T


_wmse.Whitening2d = _Whitening


class MainInterface(MethodMixin):
    """The interface of main's BaseMethod for a class of 1.0.2. It must come first in the method resolution order."""

    validation_epoch_end = None  # Lightning 2 does not accept a module with this method
    accuracy_at_k = staticmethod(accuracy_at_k)

    def __init__(self, cfg: DictConfig) -> None:
        cfg = fill_defaults(cfg)
        architecture = ARCHITECTURES.get(cfg.backbone.name)
        if architecture is not None:
            architecture = partial(architecture, cfg.method, cifar=cfg.backbone.kwargs.cifar)
        object.__setattr__(self, "_architecture", architecture)  # before nn.Module.__init__
        keywords = _keywords(cfg, type(self))
        stem = pop_stem(cfg.backbone.name, keywords["backbone_args"])
        super().__init__(**keywords)
        self.set_stem(stem)
        self.encoder_name = cfg.backbone.name
        self.cfg = cfg
        self.knn_eval = cfg.knn_eval.enabled
        if self.knn_eval:
            self.knn = WeightedKNNClassifier(k=cfg.knn_eval.k, distance_fx=cfg.knn_eval.distance_func)
        self.validation_step_outputs: list[dict[str, Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_model" and self._architecture is not None:
            value = self._architecture
        super().__setattr__(_RENAMED.get(name, name), value)

    @property
    def encoder(self) -> torch.nn.Module:
        """1.0.2's name of the backbone."""
        return self.backbone

    @property
    def momentum_encoder(self) -> torch.nn.Module:
        """1.0.2's name of the teacher's backbone."""
        return self.momentum_backbone

    def momentum_forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the teacher's features ``feats`` of images ``[B, 3, H, W]``, without gradient."""
        return self.base_momentum_forward(X)

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Return the parameter groups of the optimiser with main's names, under which learning rates are logged."""
        groups = super().learnable_params
        for group in groups:
            if "name" in group:  # the groups of heads have no name
                group["name"] = _RENAMED.get(group["name"], group["name"])
        return groups

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Call Lightning's method if the first argument is an optimiser, else the method of DINO."""
        if args and not isinstance(args[0], torch.optim.Optimizer):
            super().clip_gradients(*args, **kwargs)
        else:
            pl.LightningModule.clip_gradients(self, *args, **kwargs)


class Linear(_HostLinear):
    """1.0.2's LinearModel with main's constructor."""

    validation_epoch_end = None
    accuracy_at_k = staticmethod(accuracy_at_k)

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

    def layer_decay_groups(self) -> list[dict[str, Any]]:
        """Raise an error: 1.0.2 has no layer decay."""
        raise needs_main_error("optimizer.layer_decay", RELEASE)


def _keywords(cfg: DictConfig, cls: type) -> dict[str, Any]:
    """Translate main's configuration to the keyword arguments of a constructor of 1.0.2."""
    backbone = OmegaConf.to_container(cfg.backbone.kwargs)
    if cfg.backbone.name.startswith(_MAIN_ONLY):
        raise needs_main_error(f"backbone {cfg.backbone.name}", RELEASE)
    if cfg.backbone.name not in backbones():
        raise unknown_backbone_error(cfg.backbone.name, backbones())
    if cfg.data.dataset in CIFAR_STEM:
        backbone["cifar"] = True
    if cfg.backbone.name.startswith(("vit", "swin")):
        backbone.setdefault("img_size", cfg.augmentations[0].crop_size)
    keywords = {
        "encoder": _SUBSTITUTE if cfg.backbone.name in ARCHITECTURES else cfg.backbone.name,
        "num_classes": cfg.data.num_classes,
        "backbone_args": backbone,
        "max_epochs": cfg.max_epochs,
        "batch_size": cfg.optimizer.batch_size,
        # MainInterface builds the optimiser and the k-NN classifier; these values only have to be valid
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
    if issubclass(cls, HostMomentumBase):
        keywords["base_tau_momentum"] = cfg.momentum.base_tau
        keywords["final_tau_momentum"] = cfg.momentum.final_tau
        keywords["momentum_classifier"] = cfg.momentum.classifier
    if getattr(cls, "native", False):
        given = OmegaConf.to_container(cfg.method_kwargs)
        own = {key: value for key, value in given.items() if key in method_options(cls)}
        keywords.update({**_parser_defaults(cls), **own})
    return keywords


def backbones() -> list[str]:
    """Return the names of solo-learn's backbones and of ours."""
    return [*HostBase._SUPPORTED_ENCODERS, *ARCHITECTURES]


def method_options(cls: type) -> dict[str, Any]:
    """Return the keyword arguments that a native method adds to those of the base classes."""
    return {
        name: parameter
        for base in host_classes(cls)
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
    }


def _parser_defaults(cls: type) -> dict[str, Any]:
    """Return the defaults of a native method's options: those of its argument parser, or main's if they differ."""
    parser = cls.add_model_specific_args(ArgumentParser(add_help=False))
    defaults = {action.dest: action.default for action in parser._actions if action.dest in method_options(cls)}
    return {name: _MAIN_DEFAULTS.get(name, default) for name, default in defaults.items()}
