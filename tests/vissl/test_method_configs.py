"""Every configuration of our methods composes, and builds model, loss, optimiser, schedule and views."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vissl.data.ssl_transforms import get_transform
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from plugins.methods import METHODS
from vissl_ext.registry import register
from vissl_ext.task import PluginTask, check_config

register()
pytestmark = pytest.mark.vissl

ROOT = Path(__file__).parents[2] / "configs" / "vissl" / "config"
OURS = sorted(
    str(path.relative_to(ROOT).with_suffix(""))
    for path in (ROOT / "pretrain").rglob("*.yaml")
    if path.parent.name in METHODS
)


def test_every_method_has_its_three() -> None:
    expected = {f"pretrain/{method}/{data}" for method in METHODS for data in ("digits", "cifar", "imagenet_rn50")}
    assert expected <= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_pretraining_configuration_builds(name: str) -> None:
    from PIL import Image

    cfg = compose_hydra_configuration([f"config={name}"])
    config: Any = convert_to_attrdict(cfg, dump_config=False)[1]
    config.MACHINE.DEVICE, config.MODEL.AMP_PARAMS.USE_AMP = "cpu", False
    config.MODEL.SYNC_BN_CONFIG.CONVERT_BN_TO_SYNC_BN = False
    check_config(config)
    task = PluginTask.from_config(config)
    task.base_model = task._build_model()
    head = task.base_model.heads[0]
    first = next(module for module in head.projector.modules() if isinstance(module, torch.nn.Linear))
    assert head.in_dim == first.in_features
    task.base_loss = task._build_loss()
    task.optimizer, task.optimizer_schedulers = task._build_optimizer(), task._build_optimizer_schedulers()
    task.prepare_optimizer()

    transform = get_transform(config.DATA.TRAIN.TRANSFORMS)
    noise = Image.effect_noise((300, 300), 50).convert("RGB")
    views = transform({"data": [noise], "label": [0], "data_valid": [True], "data_idx": [0]})["data"]
    assert len(views) == 2
    crop = {"digits": 16, "cifar": 32, "imagenet_rn50": 224}[name.rpartition("/")[2]]
    assert all(view.shape == (3, crop, crop) for view in views)

    # the peak of the schedule is the base value times the images of a step over 256
    images = (
        config.DATA.TRAIN.BATCHSIZE_PER_REPLICA * config.DISTRIBUTED.NUM_NODES * config.DISTRIBUTED.NUM_PROC_PER_NODE
    )
    schedule = task.optimizer_schedulers["lr"]
    peak = max(schedule(step / 1000) for step in range(1000))
    base = config.OPTIMIZER.param_schedulers.lr.auto_lr_scaling
    assert peak == pytest.approx(base.base_value * images / base.base_lr_batch_size, rel=1e-4)
    assert len(torch.nn.utils.parameters_to_vector(task.base_model.parameters())) > 1e7
