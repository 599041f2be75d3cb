"""DISSL's weights: every form of file, completely or not at all; cached downloads."""

import hashlib
import runpy
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn

from plugins.heads import expand_resnet_dim
from plugins.tools import export
from plugins.tools.command import UserError
from plugins.tools.hub import constructors
from plugins.tools.weights import NAMES, RELEASE, dissl_resnet50, load_dissl


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A ResNet-18 of 1024 dimensions whose running statistics are not those of an untrained one."""
    torch.manual_seed(0)
    model = expand_resnet_dim(torchvision.models.resnet18(), 1024, bottleneck=16)
    model(torch.randn(4, 3, 32, 32))
    return model.eval()


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def published(model: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The model's tensors as the published files name them."""
    return {prefix + key.replace("avgpool.0.", "resizer."): value for key, value in model.state_dict().items()}


def forms(model: nn.Module) -> dict[str, dict]:
    head = {"0.clf.0.weight": torch.zeros(3, 1024)}
    parts = {"trunk": published(model, "_feature_blocks."), "heads": head}
    return {
        "flat": published(model),
        "our own names": dict(model.state_dict()),
        "prefixed": published(model, "_feature_blocks."),
        "trunk": {**published(model, "trunk._feature_blocks."), "heads.0.weight": torch.zeros(2)},
        "model_state_dict": {"model_state_dict": published(model, "trunk.")},
        "vissl": {"classy_state_dict": {"base_model": {"model": parts, "meta": {"input_shape": None}}}, "train": True},
    }


@pytest.mark.sample("flat")
@pytest.mark.parametrize("form", ["flat", "our own names", "prefixed", "trunk", "model_state_dict", "vissl"])
def test_every_form_gives_the_same_model(form, model, tmp_path):
    torch.save(forms(model)[form], tmp_path / "file.torch")
    loaded = load_dissl(tmp_path / "file.torch")
    assert torch.equal(features(loaded), features(model))
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.sample("2048-318")
@pytest.mark.parametrize(("dim", "tensors"), [(2048, 318), (8192, 336)])
def test_resnet50_of_the_published_sizes(dim, tensors, tmp_path):
    with torch.device("meta"):
        wanted = published(expand_resnet_dim(torchvision.models.resnet50(), dim))
    state = {key: torch.full(value.shape, 0.5).to(value.dtype) for key, value in wanted.items()}
    assert len(state) == tensors
    torch.save(state, tmp_path / "file.torch")
    assert (tmp_path / "file.torch").stat().st_size / 2**20 == pytest.approx({2048: 90.0, 8192: 119.1}[dim], abs=0.2)
    loaded = load_dissl(str(tmp_path / "file.torch")).state_dict()
    assert len(loaded) == tensors and all(
        (value == 0.5).all() for value in loaded.values() if value.is_floating_point()
    )


@pytest.mark.sample("<lambda>-fits no ResNet")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer4.1.bn2.running_var"), "with resnet18: 1 missing, first layer4.1.bn2.run"),
        (lambda s: s.update({"fc.weight": torch.zeros(10, 1024)}), "1 unexpected, first fc.weight"),
        (
            lambda s: s.update({"resizer.bn3.bias": torch.zeros(9)}),
            "1 of another shape, first resizer.bn3",
        ),
        (lambda s: s.update({"resizer.conv3.weight": torch.zeros(700, 16, 1, 1)}), "fits no ResNet"),
        (lambda s: s.pop("conv1.weight"), "contains no ResNet: it has no conv1.weight"),
    ],
)
def test_what_does_not_fit_is_named(change, message, model, tmp_path):
    state = published(model)
    change(state)
    torch.save(state, tmp_path / "file.torch")
    with pytest.raises(UserError, match=message):
        load_dissl(tmp_path / "file.torch")


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no file nowhere\.torch, and no published weights of that name: "):
        load_dissl("nowhere.torch")
    (tmp_path / "text.torch").write_text("hello")
    with pytest.raises(UserError, match="is not a readable file of weights"):
        load_dissl(tmp_path / "text.torch")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "code.torch")
    with pytest.raises(UserError, match="is not a readable file of weights"):
        load_dissl(tmp_path / "code.torch")
    torch.save([1, 2], tmp_path / "list.torch")
    with pytest.raises(UserError, match="contains no ResNet"):
        load_dissl(tmp_path / "list.torch")


BROKEN = {
    "empty checkpoint": (
        lambda s: {"classy_state_dict": {}},
        "is not a complete VISSL checkpoint: it has no base_model",
    ),
    "no model": (lambda s: {"classy_state_dict": {"base_model": {}}}, "has no base_model.model"),
    "no trunk": (lambda s: {"classy_state_dict": {"base_model": {"model": {"heads": {}}}}}, "model.trunk"),
    "a list": (lambda s: {"classy_state_dict": [1]}, "has no base_model"),
    "a list as trunk": (lambda s: {"classy_state_dict": {"base_model": {"model": {"trunk": [1]}}}}, "model.trunk"),
    "vector": (lambda s: {**s, "resizer.conv3.weight": torch.zeros(9)}, "with resnet18: .* unexpected"),
    "scalar": (lambda s: {**s, "resizer.conv3.weight": torch.tensor(1.0)}, "with resnet18: .* unexpected"),
    "integers": (lambda s: {key: value.long() for key, value in s.items()}, "with resnet18: .* of another type, first"),
    "sparse": (lambda s: {**s, "bn1.bias": s["bn1.bias"].to_sparse()}, "type, first bn1.bias|bn1.bias is a sparse"),
    "complex": (lambda s: {**s, "bn1.bias": s["bn1.bias"] + 1j}, "with resnet18: 1 of another type, first bn1.bias"),
}


@pytest.mark.sample("no trunk-*", "sparse-export")
@pytest.mark.parametrize("reader", ["load_dissl", "export"])
@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_one_sentence(broken, reader, model, tmp_path, capsys):
    change, message = BROKEN[broken]
    torch.save(change(published(model)), tmp_path / "file.torch")
    with pytest.raises(UserError, match=message) as error:
        if reader == "load_dissl":
            load_dissl(tmp_path / "file.torch")
        else:
            export.export(tmp_path / "file.torch", "dissl", tmp_path / "out.torch")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.torch").exists()


@pytest.mark.sample("dtype1")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_single(dtype, model, tmp_path):
    state = {key: value.to(dtype) for key, value in published(model).items()}  # counts of batches too, as some do
    torch.save(state, tmp_path / "file.torch")
    loaded = load_dissl(tmp_path / "file.torch")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert loaded.bn1.num_batches_tracked.dtype == torch.int64
    torch.testing.assert_close(features(loaded), features(model), atol=0.1, rtol=0.1)
    export.export(tmp_path / "file.torch", "dissl", tmp_path / "out.torch")
    written = torch.load(tmp_path / "out.torch", weights_only=True)
    assert {key: value.dtype for key, value in written.items()} == {k: v.dtype for k, v in published(model).items()}


def test_sha256_of_a_local_file_is_checked_when_given(model, tmp_path):
    torch.save(published(model), tmp_path / "file.torch")
    digest = hashlib.sha256((tmp_path / "file.torch").read_bytes()).hexdigest()
    load_dissl(tmp_path / "file.torch", sha256=digest.upper())
    with pytest.raises(UserError, match=f"has the sha256 {digest}, not {'0' * 64}"):
        load_dissl(tmp_path / "file.torch", sha256="0" * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["file.torch"]


@pytest.fixture
def release(model, tmp_path, monkeypatch):
    """A stand-in for the network: what is downloaded is the small model. The calls are listed."""
    calls = []

    def download(url, target, hash_prefix=None):
        calls.append((url, hash_prefix))
        torch.save(published(model), target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return calls


@pytest.mark.slow
def test_download_is_kept_and_remembered(release, model, tmp_path):
    name = "dissl_resnet50_d8192_e400_m6"
    file = tmp_path / "hub" / "checkpoints" / f"{name}.torch"
    for _ in range(2):
        assert torch.equal(features(load_dissl(name)), features(model))
    assert release == [(f"{RELEASE}/{name}.torch", None)]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert file.with_name(f"{name}.torch.sha256").read_text() == f"{digest}\n"
    with pytest.raises(UserError, match="not 00"):
        load_dissl(name, sha256="0" * 64)
    state = published(model)
    state["conv1.weight"] = state["conv1.weight"] + 1
    torch.save(state, file)
    with pytest.raises(UserError, match=f"not {digest}; if the file is damaged, delete it"):
        load_dissl(name)
    file.unlink()  # a new download is another file, as the first was
    load_dissl(name)
    assert len(release) == 2


def test_given_sha256_is_checked_before_the_file_is_kept(release):
    with pytest.raises(UserError, match="not 00"):
        load_dissl(NAMES[0], sha256="0" * 64)
    assert release[0][1] == "0" * 64  # torch.hub compares it with the whole download


def test_no_network_is_one_sentence(release, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError) as error:
        load_dissl(NAMES[0])
    file = tmp_path / "hub" / "checkpoints" / f"{NAMES[0]}.torch"
    url = f"{RELEASE}/{NAMES[0]}.torch"
    assert str(error.value) == (
        f"cannot download {url} (Name or service not known); put the file at {file}, or give its path"
    )


@pytest.mark.slow
def test_hub_has_every_name(release, model):
    root = str(Path(__file__).parents[2])
    public = {key for key, value in runpy.run_path(f"{root}/hubconf.py").items() if callable(value) and key[0] != "_"}
    assert public - {*constructors()} == {*NAMES, "preprocessor", "Callable", "Any"}
    loaded = torch.hub.load(root, NAMES[1], source="local", trust_repo=True)
    assert torch.equal(features(loaded), features(model))
    with torch.device("meta"):
        for name in NAMES:
            untrained = torch.hub.load(root, name, source="local", pretrained=False)
            assert len(untrained.state_dict()) == (318 if "dNone" in name else 336)
            assert isinstance(untrained.fc, nn.Identity)
    constructor = runpy.run_path(f"{root}/hubconf.py")[NAMES[6]]
    assert "8192 dimensions, trained by DISSL for 800 epochs of 8 crops" in constructor.__doc__


@pytest.mark.slow
def test_pretrained_weights_and_torchvisions_options(release, tmp_path):
    state = published(expand_resnet_dim(torchvision.models.resnet50(), 2048))
    torch.save(state, tmp_path / "file.torch")
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "file.torch").rename(tmp_path / "hub" / "checkpoints" / f"{NAMES[0]}.torch")
    dilated = dissl_resnet50(NAMES[0], replace_stride_with_dilation=[False, False, True])
    assert dilated.layer4[0].conv2.stride == (1, 1) and not dilated.training and not release
    assert torch.equal(dilated.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


def test_preprocessor():
    root = str(Path(__file__).parents[2])
    prepare = torch.hub.load(root, "preprocessor", source="local")
    image = torchvision.transforms.functional.to_pil_image(torch.full((3, 300, 400), 0.485))
    prepared = prepare(image)
    assert prepared.shape == (3, 224, 224)
    assert prepared[0].abs().max() < 0.02
    assert prepared[1].mean().item() == pytest.approx((0.485 - 0.456) / 0.224, abs=0.02)


@pytest.mark.sample("vissl")
@pytest.mark.parametrize("kind", ["solo", "lightly", "vissl"])
def test_checkpoints_trained_here_become_such_files(kind, model, tmp_path, capsys):
    def prefixed(module, prefix):
        return {f"{prefix}{key}": value for key, value in module.state_dict().items()}

    body = nn.Sequential(*list(model.children())[:-1])
    content = {
        "solo": {"state_dict": {**prefixed(model, "backbone."), "projector.0.weight": torch.zeros(3, 1024)}},
        "lightly": {"state_dict": prefixed(body, "backbone.")},
        "vissl": forms(model)["vissl"],
    }[kind]
    torch.save(content, tmp_path / "run.ckpt")
    export.main([str(tmp_path / "run.ckpt"), "--to", "dissl", str(tmp_path / "out.torch")])
    assert "the format of DISSL's weights, 138 tensors" in capsys.readouterr().out
    written = torch.load(tmp_path / "out.torch", weights_only=True)
    assert set(written) == set(published(model))
    assert torch.equal(features(load_dissl(tmp_path / "out.torch")), features(model))
