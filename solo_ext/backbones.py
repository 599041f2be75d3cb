"""Backbones by name, for the commands that need only the backbone of a method."""

from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from solo_ext.compat import BaseMethod


def build_backbone(name: str, kwargs: dict[str, Any], dataset: str, crop_size: int) -> nn.Module:
    """Build an untrained backbone as pre-training does: without a classifier, and with the CIFAR stem for CIFAR.

    Args:
        name: name of the backbone.
        kwargs: arguments of its constructor.
        dataset: name of the dataset.
        crop_size: side of the images, in pixels.

    Raises:
        UserError: there is no backbone of that name.
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
