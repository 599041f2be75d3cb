"""Backbones come out of every framework's checkpoint whole, or not at all."""

import functools
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from plugins.tools.export import main


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
    return model.state_dict()


@pytest.mark.parametrize("kind", ["solo main", "solo 1.0.2", "lightly", "vissl", "bare"])
def test_features_are_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = resnet()
    torch.save(checkpoint(kind, model), tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "torchvision", str(tmp_path / "tv.pth")])
    said = capsys.readouterr().out
    assert "resnet18 for torchvision, 120 tensors; dropped: " in said
    assert {"bare": "nothing", "vissl": "heads (1)", "lightly": "projector (1), teacher_backbone (120)"}.get(
        kind, "projector (1)"
    ) in said
    other = torchvision.models.resnet18()
    other.fc = nn.Identity()
    other.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True))
    torch.testing.assert_close(features(other), features(model), rtol=1e-6, atol=1e-6)

    main([str(tmp_path / "run.ckpt"), "--to", "timm", str(tmp_path / "timm.pth")])
    other = timm.create_model("resnet18", num_classes=0)
    other.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True))
    torch.testing.assert_close(features(other), features(model), rtol=1e-6, atol=1e-6)


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
    assert "give the model a 3x3 conv1 of stride 1 and no maxpool" in capsys.readouterr().out
    assert torch.equal(torch.load(tmp_path / "tv.pth", weights_only=True)["conv1.weight"], model.conv1.weight)


def test_other_architectures_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    torch.save({"state_dict": prefixed(model, "backbone.")}, tmp_path / "run.ckpt")
    main([str(tmp_path / "run.ckpt"), "--to", "timm", str(tmp_path / "x.pth"), "--arch", "vit_tiny_patch16_224"])
    written = torch.load(tmp_path / "x.pth", weights_only=True)
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())


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
        ([text], f"{text} is no checkpoint that can be read: "),
        ([none], f"{none} holds no backbone"),
        ([lacking, "--arch", "resnet18"], "the backbone is no resnet18 of torchvision: missing bn1.bias"),
        ([lacking], "the backbone is no ResNet"),
        ([more, "--arch", "resnet18"], "the backbone is no resnet18 of torchvision: left over fc.weight"),
        ([run, "--arch", "resnet34"], "the backbone is no resnet34 of torchvision: missing layer1.2.conv1.weight and "),
        ([run, "--arch", "resnet81"], "torchvision has no model 'resnet81'"),
        ([vit], "name its architecture with --arch"),
        ([run, "--to", "detectron2"], "invalid choice: 'detectron2'"),
    ]
    for arguments, sentence in cases:
        with pytest.raises(SystemExit) as stopped:
            main(["--to", "torchvision", *map(str, arguments), str(tmp_path / "new" / "out.pth")])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and sentence in said and said.count("\n") == 1, (
            said
        )
    assert not (tmp_path / "new").exists()
