"""Backbones from a file, by ``load_weights`` and by the constructors of hubconf.py."""

import argparse
import hashlib
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from plugins.methods import METHODS
from plugins.tools.backbones import headless_backbone
from plugins.tools.command import UserError
from plugins.tools.export import export, main, read_backbone
from plugins.tools.hub import ARCHITECTURES, OWN_ARCHITECTURES, constructors, load_weights
from plugins.tools.wide_resnet import LAYERS

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


@pytest.mark.slow
def test_a_checkpoint_the_folder_of_a_run_and_an_export_are_the_same_network(
    checkpoint: Path, backbone: nn.Module, tmp_path: Path
) -> None:
    exported = tmp_path / "backbone.pth"
    export(checkpoint, "torchvision", exported)
    for source in (checkpoint, str(checkpoint.parent), exported):
        assert same(load_weights(source), backbone)
    digest = hashlib.sha256(exported.read_bytes()).hexdigest()
    assert same(load_weights(exported, "resnet18", sha256=digest.upper()), backbone)


@pytest.mark.slow
def test_hub_builds_the_backbone_of_every_method(checkpoint: Path, backbone: nn.Module) -> None:
    found = torch.hub.load(ROOT, "ssl_ey_resnet18", source="local", trust_repo=True, weights=checkpoint)
    assert same(found, backbone)
    names = runpy.run_path(f"{ROOT}/hubconf.py")
    wanted = {f"{method}_{arch}" for method in METHODS for arch in ARCHITECTURES}
    wanted |= {"amdim_amdim_encoder", "cpc_wrn_28_2_gn", "cpc_resnet101_v2_stacks", "cpc_resnet161_v2_stacks"}
    assert wanted == {*constructors()} <= {*names}
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


# --------------------------------------------------------------------------------------- files of VICReg's scripts


def not_a_weight(parameter: torch.Tensor) -> bool:
    """A function in the optimiser's state, which VICReg's script writes there."""
    return parameter.ndim == 1


def files_of_vicreg(backbone: nn.Module, folder: Path) -> dict[str, Path]:
    """The three files of its scripts: of the training, of the backbone alone, and of the evaluation."""

    def prefixed(prefix: str) -> dict[str, torch.Tensor]:
        return {f"{prefix}{name}": value for name, value in backbone.state_dict().items()}

    projector = {"module.projector.0.weight": torch.zeros(4, 512), "module.projector.0.bias": torch.zeros(4)}
    optimizer = {
        "state": {0: {"mu": torch.zeros(2)}},
        "param_groups": [{"lr": 0.0, "weight_decay_filter": not_a_weight}],
    }
    training = {"epoch": 3, "model": {**prefixed("module.backbone."), **projector}, "optimizer": optimizer}
    classifier = {"module.1.weight": torch.zeros(10, 512), "module.1.bias": torch.zeros(10)}
    evaluation = {
        "epoch": 3,
        "best_acc": argparse.Namespace(top1=1.0),
        "model": {**prefixed("module.0."), **classifier},
    }
    found = {"model.pth": training, "resnet50.pth": backbone.state_dict(), "checkpoint.pth": evaluation}
    for name, content in found.items():
        torch.save(content, folder / name)
    return {name: folder / name for name in found}


@pytest.mark.slow
def test_files_of_vicregs_scripts_are_read(backbone: nn.Module, tmp_path: Path) -> None:
    files = files_of_vicreg(backbone, tmp_path)
    for name, path in files.items():
        assert same(load_weights(path), backbone), name
        assert same(torch.hub.load(ROOT, "ssl_ey_resnet18", source="local", weights=path), backbone), name
    dropped = {name: dict(read_backbone(path).dropped) for name, path in files.items()}
    assert dropped == {"model.pth": {"projector": 2}, "resnet50.pth": {}, "checkpoint.pth": {"1": 2}}


def vicreg_layout(depth: int, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the backbone that VICReg's resnet.py builds, written from its description."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, norm: str, out: int, inner: int, side: int) -> None:
        shapes[f"{name}.weight"] = (out, inner, side, side)
        shapes.update({f"{norm}.{each}": (out,) for each in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    convolution("conv1", "bn1", 64 * width, 3, 7)
    entering = 64 * width
    for stage, blocks in enumerate(LAYERS[depth]):
        inner = 64 * width * 2**stage
        for block in range(blocks):
            place = f"layer{stage + 1}.{block}"
            for number, (out, into, side) in enumerate(
                ((inner, entering, 1), (inner, inner, 3), (4 * inner, inner, 1))
            ):
                convolution(f"{place}.conv{number + 1}", f"{place}.bn{number + 1}", out, into, side)
            if block == 0:
                convolution(f"{place}.downsample.0", f"{place}.downsample.1", 4 * inner, entering, 1)
            entering = 4 * inner
    return shapes


@pytest.mark.parametrize(
    ("arch", "depth", "width"), [("resnet50", 50, 1), ("resnet50x2", 50, 2), ("resnet200x2", 200, 2)]
)
def test_vicregs_published_networks_have_the_names_and_shapes_of_ours(arch: str, depth: int, width: int) -> None:
    with torch.device("meta"):
        network = constructors(["ssl_ey"])[f"ssl_ey_{arch}"]()
    ours = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert ours == vicreg_layout(depth, width)
    assert sum(parameter.numel() for parameter in network.parameters()) // 10**6 == {1: 23, 2: 93}.get(
        width * depth // 50, 250
    )


@pytest.mark.slow
def test_a_checkpoint_of_a_wide_resnet_is_exported_and_loaded_by_torch_hub(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = headless_backbone("resnet50x2")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        network(images)  # in training mode: the running statistics are no longer those of a new network
        network.eval()
        expected = network(images)
    run = tmp_path / "run"
    run.mkdir()
    state = {f"backbone.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": {**state, "projector.0.weight": torch.zeros(1)}}, run / "ssl_ey-ep=1.ckpt")
    main([str(run), "--to", "torchvision", str(tmp_path / "backbone.pth")])
    for file in (tmp_path / "backbone.pth", run):  # the backbone alone, and the full checkpoint
        found = torch.hub.load(ROOT, "ssl_ey_resnet50x2", source="local", weights=file)
        with torch.no_grad():
            assert torch.equal(found(images), expected) and expected.shape == (2, 4096)
        found = None


# ------------------------------------------------------------------------------------- every method and framework


def encoders() -> dict[str, tuple[Callable[[], nn.Module], str | None, dict[str, int]]]:
    """The networks that a method has of its own, and a ResNet: function, name and options."""
    small = {"size": 64, "ndf": 2, "n_rkhs": 16, "n_depth": 1}
    return {
        "resnet8": (lambda: headless_backbone("resnet8"), "resnet8", {}),
        "amdim_encoder": (lambda: headless_backbone("amdim_encoder", **small), "amdim_encoder", small),
        "wrn_28_2_gn": (lambda: headless_backbone("wrn_28_2_gn"), "wrn_28_2_gn", {}),
    }


def checkpoint_of(framework: str, network: nn.Module) -> dict:
    """The content of a framework's checkpoint, with parts of the method that are no backbone."""
    state = network.state_dict()
    if framework == "vissl":
        trunk = {f"network.{name}": value for name, value in state.items()}
        heads = {"0.projector.0.weight": torch.zeros(2, 2)}
        return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}}}
    name = "encoder." if framework == "solo 1.0.2" else "backbone."
    more = {"projector.0.weight": torch.zeros(2, 2), "objective.criterion.bank.rows": torch.zeros(2, 2)}
    return {"state_dict": {**{f"{name}{key}": value for key, value in state.items()}, **more}}


@pytest.mark.parametrize("framework", ["solo main", "solo 1.0.2", "lightly", "vissl"])
@pytest.mark.parametrize("encoder", ["resnet8", "amdim_encoder", "wrn_28_2_gn"])
def test_encoders_of_our_own_are_loaded_from_every_framework(encoder: str, framework: str, tmp_path: Path) -> None:
    build, arch, options = encoders()[encoder]
    torch.manual_seed(0)
    network = build().eval()
    torch.save(checkpoint_of(framework, network), tmp_path / "run.ckpt")
    digest = hashlib.sha256((tmp_path / "run.ckpt").read_bytes()).hexdigest()
    found = load_weights(tmp_path / "run.ckpt", arch, sha256=digest, **options)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found(images), network(images))
    if (name := {"amdim_encoder": "amdim", "wrn_28_2_gn": "cpc"}.get(encoder)) is not None:
        assert arch in OWN_ARCHITECTURES[name]
        again = constructors([name])[f"{name}_{arch}"](tmp_path / "run.ckpt", sha256=digest, **options)
        assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))
    state = checkpoint_of(framework, network)
    parts = state["classy_state_dict"]["base_model"]["model"]["trunk"] if framework == "vissl" else state["state_dict"]
    parts.pop(next(name for name in parts if name.endswith("weight")))
    torch.save(state, tmp_path / "run.ckpt")
    with pytest.raises(UserError, match=f"is not a {arch} of torchvision: missing "):
        load_weights(tmp_path / "run.ckpt", arch, **options)


def test_options_of_a_network_are_checked(checkpoint: Path) -> None:
    for arch, options, message in (
        (None, {"size": 64}, "the options size need an architecture; set arch too"),
        ("amdim_encoder", {"size": 50}, "network amdim_encoder: size must be one of 32, 64, 128, got 50"),
        ("amdim_encoder", {"depth": 3}, "network amdim_encoder: .*unexpected keyword argument 'depth'"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(checkpoint, arch, **options)
