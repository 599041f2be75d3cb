"""Trainings of VISSL's own methods that are killed resume to the same numbers."""

from collections.abc import Callable

import pytest
import torch

pytestmark = [pytest.mark.vissl, pytest.mark.slow]


SMALL = {
    "MoCo": [
        *("config.MODEL.TRUNK.NAME=plain_resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=8"),
        "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,64],use_relu:true,skip_last_layer_relu_bn:false}],[mlp,{dims:[64,128]}]]",
    ],
    "DINO, DeiT": ["config.MODEL.TRUNK.VISION_TRANSFORMERS.NUM_LAYERS=1"],
}
"""Method, two kinds of momentum encoder → overrides of the network; test_stock.py trains the stock one."""


def tensors(value, name=""):
    """The tensors in nested dictionaries and lists, by their place."""
    if isinstance(value, dict):
        return {k: v for key, entry in value.items() for k, v in tensors(entry, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return tensors(dict(enumerate(value)), name)
    return {name: value} if torch.is_tensor(value) else {}


@pytest.mark.parametrize("method", SMALL)
def test_killed_training_resumes_to_the_same_checkpoint(method, stock_commands, tmp_path, launches: Callable):
    jobs = []
    for kind in ("whole", "cut", "cut"):
        argv = [*stock_commands[method](tmp_path / kind, 2), *SMALL[method], "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"]
        jobs.append({"argv": argv, "folder": str(tmp_path)})
    jobs[1]["when"] = str(tmp_path / "cut" / "model_phase0.torch")
    whole, killed, resumed = launches(jobs)
    assert (whole["status"], killed["status"], resumed["status"]) == (0, -9, 0), resumed["output"][-3000:]
    assert "resumed after 2 of 4 iterations" in resumed["output"]
    one, other = (
        tensors(torch.load(tmp_path / kind / "model_final_checkpoint_phase1.torch", weights_only=False))
        for kind in ("whole", "cut")
    )
    assert one.keys() == other.keys() and len(one) > 80
    different = [key for key in one if not torch.equal(one[key], other[key])]
    assert not different, different[:5]
