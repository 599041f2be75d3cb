"""solo-learn's main branch (1.0.6, commit 9187ea3) with current releases of PyTorch and Lightning.

No file of the checkout is changed. Corrections in addition to those in ``common``, and the reasons:

* ``utils/knn.py:53`` needs ``compute_on_step``, which torchmetrics removed. It is replaced by our classifier, for
  solo-learn's own scripts too.
* ``utils/misc.py`` ``remove_bias_and_norm_from_weight_decay``, ``methods/base.py`` ``configure_optimizers``: replaced,
  so that a checkpoint contains only plain values and can be loaded with ``weights_only``.
* ``methods/base.py:60`` ``_BACKBONES``: our architectures are added to the table.
* ``data/dali_dataloader.py:280,568``: a pipeline for the CPU needs a GPU. It is corrected for solo-learn's own scripts;
  our commands do not use these pipelines.
"""

import inspect
import re
from functools import wraps
from typing import Any

import lightning.pytorch as pl  # noqa: F401  (for our callers)
import solo.data.pretrain_dataloader as host_data  # noqa: F401  (for our callers)
import solo.methods
import solo.methods.base
import solo.methods.deepclusterv2
import solo.utils.knn
from omegaconf import DictConfig
from solo.methods import METHODS  # noqa: F401  (for our callers)
from solo.methods.base import BaseMethod as HostBase
from solo.methods.base import BaseMomentumMethod as HostMomentumBase  # noqa: F401  (for our callers)
from solo.methods.linear import LinearModel as _HostLinear
from solo.utils.metrics import accuracy_at_k
from solo.utils.misc import param_groups_layer_decay

from plugins.tools.command import UserError
from solo_ext.architectures import ARCHITECTURES, pop_stem
from solo_ext.compat.common import (
    MethodMixin,
    fill_defaults,
    host_classes,
    unknown_backbone_error,
    zero_before_clusters,
)
from solo_ext.knn import WeightedKNNClassifier

RELEASE = "1.0.6"
MULTICROP = ("byol", "simclr", "supcon", "swav", "wmse")  # W-MSE ignores them in its loss


def backbones() -> list[str]:
    """Add our backbones to solo-learn's table, and return the names of all backbones."""
    for name, factory in ARCHITECTURES.items():
        HostBase._BACKBONES.setdefault(name, factory)
    return list(HostBase._BACKBONES)


def _patch() -> None:
    """Replace functions and classes of solo-learn in the modules that use them."""
    solo.utils.knn.WeightedKNNClassifier = WeightedKNNClassifier
    solo.methods.base.WeightedKNNClassifier = WeightedKNNClassifier
    backbones()
    deepcluster = solo.methods.deepclusterv2
    deepcluster.deepclusterv2_loss_func = zero_before_clusters(deepcluster.deepclusterv2_loss_func)


_patch()


def patch_dali() -> None:
    """Make main's DALI pipelines work without a GPU for ``dali.device=cpu``; no-op if DALI is not installed."""
    try:
        from solo.data.dali_dataloader import NormalPipelineBuilder, PretrainPipelineBuilder
    except ImportError:
        return
    for builder in (NormalPipelineBuilder, PretrainPipelineBuilder):
        builder.pipeline = _without_gpu(builder.pipeline)


def _without_gpu(pipeline: Any) -> Any:
    @wraps(pipeline)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.device == "cpu":
            kwargs["device_id"] = None  # with a number, DALI needs a GPU
        return pipeline(self, *args, **kwargs)

    return build


class MainInterface(MethodMixin):
    """Corrections of main's BaseMethod. The mixin must come first in the method resolution order."""

    accuracy_at_k = staticmethod(accuracy_at_k)

    def __init__(self, cfg: DictConfig) -> None:
        if cfg.backbone.name not in backbones():
            raise unknown_backbone_error(cfg.backbone.name, backbones())
        cfg = fill_defaults(cfg)
        crop_size = cfg.augmentations[0].crop_size
        if cfg.backbone.name.startswith(("vit", "swin")) and crop_size != 224:
            cfg.backbone.kwargs.setdefault("img_size", crop_size)
        stem = pop_stem(cfg.backbone.name, cfg.backbone.kwargs)  # of the copy that fill_defaults has made
        super().__init__(cfg)
        self.set_stem(stem)


class Linear(_HostLinear):
    """Main's LinearModel."""

    accuracy_at_k = staticmethod(accuracy_at_k)

    def layer_decay_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups whose learning rate decreases by ``optimizer.layer_decay`` per layer."""
        if not self.finetune or not hasattr(self.backbone, "no_weight_decay"):
            raise UserError("optimizer.layer_decay needs finetune=True and a ViT")
        groups = param_groups_layer_decay(
            self.backbone,
            self.weight_decay,
            no_weight_decay_list=self.backbone.no_weight_decay(),
            layer_decay=self.cfg.optimizer.layer_decay,
        )
        return [*groups, {"name": "classifier", "params": self.classifier.parameters()}]


def method_options(cls: type) -> list[str]:
    """Return the ``method_kwargs`` that a native method reads, found in its source code, since main has no list."""
    sources = [inspect.getsource(base) for base in host_classes(cls)]
    return re.findall(r"method_kwargs\.(\w+)", "\n".join(sources))
