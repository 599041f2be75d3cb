"""A backbone is exported completely from a checkpoint of any framework, or not at all."""

import functools
import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from PIL import Image
from torch import Tensor, nn

from plugins.tools.export import main, read_backbone


def resnet(name: str = "resnet18") -> nn.Module:
    """One whose running statistics are not those of an untrained one."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    model.fc = nn.Identity()
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def features(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 64, 64, generator=generator)).flatten(1)


def prefixed(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def checkpoint(kind: str, model: nn.Module) -> dict:
    head = {"projector.0.weight": torch.zeros(3, 512)}
    if kind == "solo main":
        schedule = {"lr_lambdas": [functools.partial(max, 1)]}  # code, as stock solo-learn writes it
        return {"state_dict": {**prefixed(model, "backbone."), **head}, "lr_schedulers": [schedule]}
    if kind == "solo 1.0.2":
        return {"state_dict": {**prefixed(model, "encoder."), **head}}
    if kind == "lightly":
        teacher = prefixed(model, "teacher_backbone.")
        body = nn.Sequential(*list(model.children())[:-1])  # as in lightly's examples
        return {"state_dict": {**prefixed(body, "backbone."), **teacher, **head}}
    if kind == "vissl":
        trunk = prefixed(model, "_feature_blocks.")
        return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": head}}, "train": True}}
    if kind == "original":  # the scripts of MEC and Matrix-SSL: the projector is the encoder's fc
        fc = {"module.encoder.fc.0.weight": torch.zeros(3, 512), "module.encoder.fc.1.bias": torch.zeros(3)}
        return {"state_dict": {**prefixed(model, "module.encoder."), **fc, **prefixed(model, "module.teacher.")}}
    return model.state_dict()


@pytest.mark.slow
@pytest.mark.sample("vissl")
@pytest.mark.parametrize("kind", ["solo main", "solo 1.0.2", "lightly", "vissl", "bare", "original"])
def test_features_are_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = resnet()
    torch.save(checkpoint(kind, model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "torchvision", str(tmp_path / "tv.pth")])
    said = capsys.readouterr().out
    assert "resnet18 for torchvision, 120 tensors; dropped: " in said
    dropped = {
        "bare": "none",
        "vissl": "heads (1)",
        "lightly": "projector (1), teacher_backbone (120)",
        "original": "encoder (2), teacher (120)",
    }
    assert dropped.get(kind, "projector (1)") in said
    other = torchvision.models.resnet18()
    other.fc = nn.Identity()
    other.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    torch.testing.assert_close(features(other), features(model), rtol=1e-6, atol=1e-6)

    main([str(tmp_path / "run.ckpt"), "--to", "timm", str(tmp_path / "timm.pth")])
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True))
    torch.testing.assert_close(features(other), features(model), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.sample("bare")
@pytest.mark.parametrize("kind", ["solo main", "solo 1.0.2", "lightly", "vissl", "bare"])
def test_detectron2(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every tensor under its name there, which is spelt out here from detectron2's side."""
    model = resnet("resnet50")
    torch.save(checkpoint(kind, model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "detectron2", str(tmp_path / "new" / "x.pkl")])
    assert "resnet50 for detectron2, 318 tensors" in capsys.readouterr().out
    with (tmp_path / "new" / "x.pkl").open("rb") as file:
        written = pickle.load(file)
    assert set(written) == {"model", "__author__", "matching_heuristics"} and written["matching_heuristics"] is True
    state, expected = model.state_dict(), {}

    def add(conv: str, our_conv: str, our_norm: str) -> None:
        expected[f"{conv}.weight"] = state[f"{our_conv}.weight"]
        for each in ("weight", "bias", "running_mean", "running_var"):
            expected[f"{conv}.norm.{each}"] = state[f"{our_norm}.{each}"]

    add("stem.conv1", "conv1", "bn1")
    for stage, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            ours, theirs = f"layer{stage - 1}.{block}", f"res{stage}.{block}"
            for i in (1, 2, 3):
                add(f"{theirs}.conv{i}", f"{ours}.conv{i}", f"{ours}.bn{i}")
            if block == 0:
                add(f"{theirs}.shortcut", f"{ours}.downsample.0", f"{ours}.downsample.1")
    assert set(written["model"]) == set(expected)
    assert len(expected) == 318 - 53  # without the counts of batches
    for name, value in expected.items():
        assert isinstance(written["model"][name], np.ndarray)
        assert torch.equal(torch.from_numpy(written["model"][name]), value), name


@pytest.mark.slow
@pytest.mark.lightly
def test_a_backbone_that_was_trained_on_its_maps_is_exported_without_them(tmp_path: Path) -> None:
    """Two steps of AMDIM; the features of plain images are the same in torchvision."""
    from lightly_ext.models import AMDIM

    model = AMDIM(resnet().train(), proj_output_dim=8)
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.01)
    for _ in range(2):
        model.loss([torch.randn(4, 3, 32, 32), torch.randn(4, 3, 32, 32)]).backward()
        optimizer.step()
    expected = features(model)
    assert torch.equal(expected, features(model.backbone))
    torch.save({"state_dict": model.state_dict()}, tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "torchvision", str(tmp_path / "tv.pth")])
    other = torchvision.models.resnet18()
    other.fc = nn.Identity()
    other.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    torch.testing.assert_close(features(other), expected)


@pytest.mark.slow
def test_half_precision_becomes_single_for_detectron2(tmp_path: Path) -> None:
    model = resnet("resnet50").to(torch.bfloat16)
    torch.save(checkpoint("bare", model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "detectron2", str(tmp_path / "x.pkl")])
    with (tmp_path / "x.pkl").open("rb") as file:
        written = pickle.load(file)["model"]
    assert {value.dtype for value in written.values()} == {np.dtype("float32")}
    assert np.array_equal(written["stem.conv1.weight"], model.conv1.weight.detach().float().numpy())


def test_detectron2_configurations() -> None:
    """The schedules differ in length only; the input is what torchvision's ResNets are trained on."""
    folder = Path(__file__).parents[2] / "configs" / "detectron2"
    names = ("coco_r50_c4_1x.yaml", "coco_r50_c4_2x.yaml")
    base, short, long = (yaml.safe_load((folder / name).read_text()) for name in ("base_r50_c4.yaml", *names))
    assert short["SOLVER"] == {"STEPS": [60000, 80000], "MAX_ITER": 90000}
    assert long["SOLVER"] == {"STEPS": [120000, 160000], "MAX_ITER": 180000}
    assert short["_BASE_"] == long["_BASE_"] == "base_r50_c4.yaml" and short["OUTPUT_DIR"] != long["OUTPUT_DIR"]
    mean, std = ([255 * each for each in values] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert base["MODEL"]["PIXEL_MEAN"] == pytest.approx(mean, abs=5e-4)
    assert base["MODEL"]["PIXEL_STD"] == pytest.approx(std, abs=5e-4)
    assert base["INPUT"]["FORMAT"] == "RGB" and base["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False
    for name in names:
        head = (folder / name).read_text().split("\n\n")[0]
        assert all(line.startswith("#") for line in head.splitlines())
        assert (
            f"--config-file configs/detectron2/{name}" in head and "plugins.tools.export CKPT --to detectron2" in head
        )


def test_detectron2_training_names_what_is_missing() -> None:
    if importlib.util.find_spec("detectron2") is not None:
        pytest.skip("NOT TESTED without detectron2: it is installed")
    script = Path(__file__).parents[2] / "configs" / "detectron2" / "train.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: detectron2 is not installed"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_detectron2_loads_every_weight_of_the_backbone(tmp_path: Path) -> None:
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("NOT TESTED with detectron2: no package index here has it")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    model = resnet("resnet50")
    torch.save(checkpoint("bare", model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "detectron2", str(tmp_path / "x.pkl")])
    config = get_cfg()
    config.merge_from_file(str(Path(__file__).parents[2] / "configs" / "detectron2" / "coco_r50_c4_1x.yaml"))
    # of the head with one more norm only that norm is not in the file; SyncBN needs a GPU
    config.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.RESNETS.NORM", "BN"])
    detector = build_model(config)
    DetectionCheckpointer(detector).load(str(tmp_path / "x.pkl"))
    with (tmp_path / "x.pkl").open("rb") as file:
        written = pickle.load(file)["model"]
    state = detector.state_dict()
    placed = {f"{'roi_heads' if name.startswith('res5') else 'backbone'}.{name}": name for name in written}
    backbone = {name for name in state if name.startswith(("backbone.", "roi_heads.res5."))}
    assert set(placed) == {name for name in backbone if "num_batches_tracked" not in name}
    for place, name in placed.items():
        assert torch.equal(state[place], torch.from_numpy(written[name])), name
    assert torch.equal(detector.backbone.stem.conv1.weight, model.conv1.weight)
    assert torch.equal(detector.roi_heads.res5[2].conv3.norm.running_var, model.layer4[2].bn3.running_var)


@pytest.mark.slow
def test_detectron2_trains_on_the_exported_backbone(tmp_path: Path) -> None:
    """Two steps and an evaluation by train.py, on pictures of one rectangle with COCO's annotations."""
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("NOT TESTED with detectron2: no package index here has it")
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    model, project = resnet("resnet50"), Path(__file__).parents[2]
    torch.save(checkpoint("bare", model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "detectron2", str(tmp_path / "x.pkl")])
    things = [{"id": kind["id"], "name": kind["name"]} for kind in COCO_CATEGORIES if kind["isthing"]]
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        images, found = [], []
        (tmp_path / "coco" / split).mkdir()
        for i in range(1, 5):
            pixels = np.zeros((96, 96, 3), np.uint8)
            x, y, width, height = 8 * i, 10, 40, 30
            pixels[y : y + height, x : x + width] = 255
            Image.fromarray(pixels).save(tmp_path / "coco" / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 96, "width": 96})
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            shape = {"bbox": [x, y, width, height], "segmentation": [corners], "area": width * height, "iscrowd": 0}
            found.append({"id": i, "image_id": i, "category_id": things[i]["id"], **shape})
        text = json.dumps({"images": images, "annotations": found, "categories": things})
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text(text)
    words = [
        *("configs/detectron2/train.py", "--config-file", "configs/detectron2/coco_r50_c4_1x.yaml", "--num-gpus", "0"),
        *("MODEL.WEIGHTS", tmp_path / "x.pkl", "OUTPUT_DIR", tmp_path / "out", "SOLVER.MAX_ITER", 2),
        *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "TEST.PRECISE_BN.NUM_ITER", 1),
    ]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [json.loads(line).get("total_loss") for line in (tmp_path / "out" / "metrics.json").open()]
    assert [loss for loss in losses if loss is not None and math.isfinite(loss)]
    assert (tmp_path / "out" / "inference" / "coco_instances_results.json").exists()
    trained = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    start = model.layer4[2].conv3.weight
    moved = (trained["roi_heads.res5.2.conv3.weight"] - start).norm() / start.norm()
    assert 0 < moved < 0.1  # trained, and from our weights


@pytest.mark.sample("module.{}")
@pytest.mark.parametrize(
    "wrap", ["_orig_mod.{}", "module.{}", "module._orig_mod.{}", "backbone._orig_mod.{}", "model.{}"]
)
def test_wrapped_models_are_exported_without_teacher_and_head(
    wrap: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """torch.compile and DistributedDataParallel put prefixes before the names, of the whole or of the backbone."""
    model = resnet()
    state = {
        **prefixed(model, "backbone."),
        **prefixed(model, "teacher.backbone."),
        "projector.0.weight": torch.ones(2),
    }
    if wrap.startswith("backbone"):
        state = {key.replace("backbone.", "backbone._orig_mod."): value for key, value in state.items()}
    else:
        state = {wrap.format(key): value for key, value in state.items()}
    torch.save({"state_dict": state}, tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "torchvision", str(tmp_path / "x.pth")])
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert set(written) == set(model.state_dict())
    said = capsys.readouterr().out
    assert "dropped: " in said and "(121)" in said if wrap.startswith("model") else "teacher (120)" in said, said


def test_the_outermost_backbone_is_exported(tmp_path: Path) -> None:
    """A LightningModule may contain a backbone, and also a model that contains a backbone."""
    backbone, inner = nn.Linear(2, 3), nn.Linear(2, 3)
    state = {**prefixed(inner, "model.student.backbone."), **prefixed(backbone, "backbone.")}
    torch.save({"state_dict": {**state, "projector.w": torch.ones(1)}}, tmp_path / "run.ckpt")
    exported, dropped, _ = read_backbone(tmp_path / "run.ckpt")
    assert exported.keys() == backbone.state_dict().keys()
    assert all(torch.equal(exported[key], value) for key, value in backbone.state_dict().items())
    assert dropped == {"model": 2, "projector": 1}


def test_a_backbone_that_cannot_be_told_from_the_rest_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"state_dict": {"net.w": torch.ones(1), "teacher.w": torch.ones(1)}}, tmp_path / "run.ckpt")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "run.ckpt"), "--to", "safetensors", str(tmp_path / "x")])
    assert "contains no backbone: none of its parts net, teacher is named backbone" in capsys.readouterr().err


def test_a_transformer_of_torchvision_is_exported_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its blocks have the name ``encoder``, which is the name of a backbone in other checkpoints."""
    model = torchvision.models.VisionTransformer(32, 16, 1, 2, 8, 16)
    model.heads = nn.Identity()
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    main([str(tmp_path / "vit.pth"), "--to", "safetensors", str(tmp_path / "x")])
    assert f"{len(model.state_dict())} tensors; dropped: none" in capsys.readouterr().out


def test_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = resnet()
    torch.save(checkpoint("solo main", model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "safetensors", str(tmp_path / "new" / "x.safetensors")])
    written = load_file(tmp_path / "new" / "x.safetensors")
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    assert set(written) == set(model.state_dict())


def test_the_stem_for_small_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = resnet()
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    torch.save(checkpoint("solo main", model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "torchvision", str(tmp_path / "tv.pth")])
    assert "the model needs a 3x3 conv1 with stride 1 and padding 1, and no maxpool" in capsys.readouterr().out
    assert torch.equal(torch.load(tmp_path / "tv.pth", weights_only=True)["conv1.weight"], model.conv1.weight)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"state_dict": prefixed(model, "backbone.")}, tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "timm", str(tmp_path / "x.pth"), "--arch", "vit_tiny_patch16_224"])
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_mistakes_are_sentences(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = resnet()
    state = prefixed(model, "backbone.")
    run, text, none, lacking, more, vit = (
        tmp_path / name for name in ("run", "text", "none", "lacking", "more", "vit")
    )
    torch.save({"state_dict": state}, run)
    text.write_text("no checkpoint")
    torch.save({"state_dict": {}}, none)
    torch.save({"state_dict": {key: value for key, value in state.items() if key != "backbone.bn1.bias"}}, lacking)
    torch.save({"state_dict": {**state, "backbone.fc.weight": torch.zeros(10, 512)}}, more)
    torch.save({"state_dict": prefixed(timm.create_model("vit_tiny_patch16_224", num_classes=0), "backbone.")}, vit)
    cases = [
        ([tmp_path / "gone"], f"there is no file {tmp_path / 'gone'}"),
        ([text], f"{text} cannot be read as a checkpoint: "),
        ([none], f"{none} contains no backbone"),
        ([lacking, "--arch", "resnet18"], "the backbone is not a resnet18 of torchvision: missing bn1.bias"),
        ([lacking], "the backbone is not a ResNet"),
        ([more, "--arch", "resnet18"], "the backbone is not a resnet18 of torchvision: unexpected fc.weight"),
        (
            [run, "--arch", "resnet34"],
            "the backbone is not a resnet34 of torchvision: missing layer1.2.conv1.weight and ",
        ),
        ([run, "--arch", "resnet81"], "torchvision has no model 'resnet81'"),
        ([vit], "select its architecture with --arch"),
        ([run, "--to", "detectron3"], "invalid choice: 'detectron3'"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(SystemExit) as stopped:
            main(["--to", "torchvision", *map(str, arguments), str(tmp_path / "new" / "out.pth")])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and sentence in said and said.count("\n") == 1, (
            said
        )
    for out, sentence in {
        "out.pth": "OUT must end in .pkl",
        "out.pkl": "detectron2 needs resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d with",
    }.items():
        with pytest.raises(SystemExit):
            main([str(run), "--to", "detectron2", str(tmp_path / "new" / out)])
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_stands_for_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, names = resnet(), ("a-ep=9.ckpt", "a-ep=10.ckpt")
    for age, name in enumerate(reversed(names)):
        torch.save({"state_dict": prefixed(model, "backbone." if name == names[1] else "other.")}, tmp_path / name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    main([str(tmp_path), "--to", "torchvision", str(tmp_path / "out.pth")])
    assert (tmp_path / "out.pth").is_file()
    empty = tmp_path / "empty"
    empty.mkdir()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([str(empty), "--to", "torchvision", str(tmp_path / "x.pth")])
    assert capsys.readouterr().err == f"error: {empty} contains no checkpoint, neither *.ckpt nor checkpoint.torch\n"
