"""The commands of docs/migration.md for SSL-EY on ImageNet and for VICReg's evaluate.py, on 16 images."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from plugins.tools.export import main as export
from plugins.tools.export import read_backbone

pytestmark = [pytest.mark.vissl, pytest.mark.slow]
PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text().replace("\\\n", " ")
SMALL = [
    *("config.MODEL.TRUNK.NAME=plain_resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=18", "config.OPTIMIZER.num_epochs=1"),
    *("config.DATA.NUM_DATALOADER_WORKERS=0", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8", "config.SEED_VALUE=0"),
]


def command(config: str) -> list[str]:
    """The words of the first command of the page with a configuration."""
    return shlex.split(re.findall(rf"^python -m vissl_ext.launch (config={config} .*)$", PAGE, re.MULTILINE)[0])


def test_commands_run(launches: Callable[[list[dict]], list[dict]], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for index in range(16):
            path = tmp_path / "IMAGENET" / split / f"n{index % 2}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 40 + index).convert("RGB").save(path)
    widths = ["config.LOSS.ssl_ey.proj_hidden_dim=16", "config.LOSS.ssl_ey.proj_output_dim=8"]
    words = [*command("pretrain/ssl_ey/imagenet_rn50"), *SMALL, *widths]
    words += ["config.MODEL.HEAD.PARAMS=[[method_head,{in_dim:512}]]"]
    (done,) = launches([{"argv": words, "folder": str(tmp_path)}])
    assert done["status"] == 0, done["output"]
    content = torch.load("runs/ssl_ey/checkpoint.torch", weights_only=False)["classy_state_dict"]
    head = content["base_model"]["model"]["heads"]
    assert "0.projector.6.weight" in head and "0.projector.6.bias" not in head
    trained = read_backbone(Path("runs/ssl_ey")).state
    # blocks started as the identity, so that after two steps of the warm-up their last norm is still near 0
    norms = [value for name, value in trained.items() if name.endswith("bn2.weight")]
    assert len(norms) == 8 and all(value.abs().max() < 0.1 for value in norms)

    export(["runs/ssl_ey", "--to", "torchvision", "resnet50.pth"])
    linear = command("benchmark/linear_image_classification/imagenet1k/eval_resnet50_linear")
    words = [*linear, *SMALL, "config.MODEL.HEAD.PARAMS=[[mlp,{dims:[512,1000]}]]"]
    (done,) = launches([{"argv": [*words, "config.DATA.TEST.BATCHSIZE_PER_REPLICA=8"], "folder": str(tmp_path)}])
    assert done["status"] == 0, done["output"]
    evaluated = read_backbone(Path("runs/linear")).state
    assert trained.keys() == evaluated.keys()
    loaded = [name for name in trained if not name.endswith("num_batches_tracked")]  # VISSL's SKIP_LAYERS
    assert len(loaded) == 100 and all(torch.equal(trained[name], evaluated[name]) for name in loaded)
    recorded = json.loads(Path("runs/linear/run.json").read_text())
    assert recorded["config.OPTIMIZER"]["weight_decay"] == 1e-6
    rates = re.findall(r"lr (\S+)", done["output"])
    assert rates and all(float(rate) == pytest.approx(0.02 * 8 / 256, rel=1e-3) for rate in rates)

    (tmp_path / "IMAGENET" / "train_1").symlink_to("train")
    words = [*command("benchmark/semi_supervised/imagenet1k/eval_resnet50_finetune"), *SMALL]
    words += ["config.MODEL.HEAD.PARAMS=[[mlp,{dims:[512,1000]}]]", "config.DATA.TEST.BATCHSIZE_PER_REPLICA=8"]
    words += ["config.DATA.TRAIN.TRANSFORMS.0.size=64", "config.DATA.TEST.TRANSFORMS.1.size=64"]
    (done,) = launches([{"argv": words, "folder": str(tmp_path)}])
    assert done["status"] == 0, done["output"]
    content = torch.load("runs/one_percent/checkpoint.torch", weights_only=False)["classy_state_dict"]
    groups = [group for group in content["optimizer"]["optim"]["param_groups"] if group["params"]]
    found = [(len(group["params"]), group["lr"], group["weight_decay"], group["nesterov"]) for group in groups]
    assert found == [(60, 0.03 * 8 / 256, 0, False), (2, 0.08 * 8 / 256, 0, False)]  # the backbone's, the classifier's
    tuned = read_backbone(Path("runs/one_percent")).state
    assert not [name for name in loaded if "conv" in name and torch.equal(trained[name], tuned[name])]
