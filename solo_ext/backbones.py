"""A backbone by name, for the drivers that need no more of a method than that."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from solo_ext.compat import BaseMethod


def build_backbone(name: str, kwargs: dict[str, Any], dataset: str, crop_size: int) -> nn.Module:
    """The backbone of a configuration, untrained, as pre-training builds it: without classifier, with a CIFAR stem
    where the dataset is CIFAR.

    Raises:
        UserError: there is none of that name.
    """
    cfg = {
        "method": "base",
        "backbone": {"name": name, "kwargs": kwargs},
        "data": {"dataset": dataset, "num_classes": 2, "num_large_crops": 2, "num_small_crops": 0},
        "augmentations": [{"crop_size": crop_size}],
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": 2, "lr": 0.0, "weight_decay": 0.0, "classifier_lr": 0.0},
        "scheduler": {"name": "none"},
    }
    with torch.random.fork_rng(devices=[]):
        return BaseMethod(DictConfig(cfg)).backbone
