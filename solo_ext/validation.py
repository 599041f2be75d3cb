"""The outputs of a network for all validation images, for callbacks that evaluate it while it is trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from plugins.modes import in_mode
from solo_ext.loaders import evaluation_loader


@torch.no_grad()
def validation_outputs(
    trainer: Any, module: Any, compute: Callable[[Tensor], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute outputs for all validation images in evaluation mode, on this process, without a trace in the training.

    Args:
        trainer: Lightning's Trainer, with the data module of solo_ext.
        module: the method, whose modes are restored.
        compute: images ``[B, 3, H, W]`` → outputs ``[B, D]`` by name.

    Returns:
        The outputs by name, ``[N, D]`` in single precision on the CPU, and the labels ``[N]``.
    """
    cfg, precision = trainer.datamodule.cfg, trainer.precision_plugin
    parts: dict[str, list[Tensor]] = {}
    labels = []
    # a data loader draws a random number when it starts, which must not change the training
    with in_mode(False, module), torch.random.fork_rng(devices=[]), precision.val_step_context():
        for images, targets in evaluation_loader(
            trainer.datamodule.val, cfg.optimizer.batch_size, cfg.data.num_workers
        ):
            for name, rows in compute(precision.convert_input(images.to(module.device))).items():
                parts.setdefault(name, []).append(rows.float().cpu())
            labels.append(targets.cpu())
    return {name: torch.cat(rows) for name, rows in parts.items()}, torch.cat(labels)
