"""Backbones from a file, by ``load_weights`` and by the constructors of hubconf.py."""

import hashlib
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from plugins.methods import METHODS
from plugins.tools.command import UserError
from plugins.tools.export import export
from plugins.tools.hub import ARCHITECTURES, constructors, load_weights

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return network.eval()


@pytest.fixture(scope="module")
def checkpoint(backbone: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Lightning with a projector and a teacher."""
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    state |= {f"momentum_backbone.{name}": torch.zeros_like(value) for name, value in backbone.state_dict().items()}
    path = tmp_path_factory.mktemp("run") / "ssl_ey-first-ep=9.ckpt"
    torch.save({"state_dict": {**state, "projector.0.weight": torch.zeros(3, 3)}, "epoch": 9}, path)
    return path


def same(found: nn.Module, backbone: nn.Module) -> bool:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        return torch.equal(found(images), backbone(images)) and not found.training


def test_a_checkpoint_the_folder_of_a_run_and_an_export_are_the_same_network(
    checkpoint: Path, backbone: nn.Module, tmp_path: Path
) -> None:
    exported = tmp_path / "backbone.pth"
    export(checkpoint, "torchvision", exported)
    for source in (checkpoint, str(checkpoint.parent), exported):
        assert same(load_weights(source), backbone)
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert same(load_weights(exported, "resnet18", sha256=digest.upper()), backbone)


def test_hub_builds_the_backbone_of_every_method(checkpoint: Path, backbone: nn.Module) -> None:
    found = torch.hub.load(ROOT, "ssl_ey_resnet18", source="local", trust_repo=True, weights=checkpoint)
    assert same(found, backbone)
    names = runpy.run_path(f"{ROOT}/hubconf.py")
    assert {f"{method}_{arch}" for method in METHODS for arch in ARCHITECTURES} == {*constructors()} <= {*names}
    with torch.device("meta"):
        network = names["ssl_ey_resnet200x2"]()
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 4096)
    assert "resnet50x2 without its classifier" in names["dissl_resnet50x2"].__doc__


def test_files_of_something_else_raise_a_one_line_error(checkpoint: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "text").write_text("no weights")
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}, "more": Code()}, tmp_path / "code")
    for source, arch, sha256, message in (
        (tmp_path / "gone", None, None, "there is no file"),
        (tmp_path / "text", None, None, "cannot be read as a checkpoint"),
        (tmp_path / "code", "resnet18", None, "cannot be read as a checkpoint"),
        (checkpoint, "resnet50", None, "is not a resnet50 of torchvision"),
        (checkpoint, "resnet51", None, "torchvision has no model 'resnet51'"),
        (checkpoint, None, "0" * 64, f"not {'0' * 64}; if the file is damaged, delete it"),
    ):
        with pytest.raises(UserError) as error:
            load_weights(source, arch, sha256=sha256)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()
