"""The backbones that we add: their widths, sizes, stems and options."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from plugins.tools.backbones import BACKBONES
from plugins.tools.command import UserError
from plugins.tools.export import read_backbone
from solo_ext.architectures import ARCHITECTURES
from solo_ext.backbones import build_backbone
from solo_ext.checkpoint import load_backbone
from solo_ext.compat import backbones

pytestmark = pytest.mark.solo

# name: (feature width, class of torchvision's published weights, whose metadata count the parameters)
PUBLISHED = {
    "resnet34": (512, models.ResNet34_Weights),
    "resnet101": (2048, models.ResNet101_Weights),
    "resnet152": (2048, models.ResNet152_Weights),
    "resnext50": (2048, models.ResNeXt50_32X4D_Weights),
    "resnext101": (2048, models.ResNeXt101_32X8D_Weights),
    "wide_resnet50": (2048, models.Wide_ResNet50_2_Weights),
    "wide_resnet101": (2048, models.Wide_ResNet101_2_Weights),
    "regnet_y_400mf": (440, models.RegNet_Y_400MF_Weights),
    "regnet_y_800mf": (784, models.RegNet_Y_800MF_Weights),
    "regnet_y_1_6gf": (888, models.RegNet_Y_1_6GF_Weights),
    "regnet_y_3_2gf": (1512, models.RegNet_Y_3_2GF_Weights),
    "regnet_y_8gf": (2016, models.RegNet_Y_8GF_Weights),
    "regnet_y_16gf": (3024, models.RegNet_Y_16GF_Weights),
    "regnet_y_32gf": (3712, models.RegNet_Y_32GF_Weights),
    "regnet_y_128gf": (7392, models.RegNet_Y_128GF_Weights),
}


def _build(name: str, **kwargs) -> nn.Module:
    """A network without memory."""
    with torch.device("meta"):
        return ARCHITECTURES[name]("isoloss", **kwargs)


@pytest.fixture
def unset_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights stay as allocated: random numbers for a hundred million parameters take seconds."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@torch.no_grad()
def _shape(network: nn.Module, pixels: int) -> tuple[int, ...]:
    """Shape of the features of two images."""
    device = next(network.parameters()).device
    return tuple(network(torch.zeros(2, 3, pixels, pixels, device=device)).shape)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_all_names():
    assert set(ARCHITECTURES) == {*BACKBONES, *PUBLISHED, *EXPANDED}


def test_wide_resnets_have_their_options_and_the_stem_of_cifar():
    network = _build("resnet50x2", cifar=True, zero_init_residual=True)
    assert (network.num_features, network.inplanes) == (4096, 4096)
    assert (network.conv1.weight.shape, network.conv1.padding) == ((128, 3, 3, 3), (2, 2))
    assert _shape(network, 32) == (2, 4096)
    with pytest.raises(TypeError, match="backbone resnet50x2 has no option 'width'; known options: zero_init_residual"):
        _build("resnet50x2", width=3)


# parameters without classifier: ResNet-18 11,176,512; its block to 2048 3,676,160; ResNet-50 23,508,032; to 8192
# 31,128,640 in all (arXiv:2209.06235, the published weights)
EXPANDED = {
    "expanded_resnet18": (512, 2048, 11_176_512, 11_176_512 + 3_676_160),
    "expanded_resnet34": (512, 1024, 21_284_672, None),
    "expanded_resnet50": (2048, 8192, 23_508_032, 31_128_640),
    "expanded_resnet101": (2048, 4096, 42_500_160, None),
}


@pytest.mark.sample("expanded_resnet18")
@pytest.mark.parametrize("name", sorted(EXPANDED))
def test_expanded_widths(name):
    own, wide, count, expanded = EXPANDED[name]
    network, wider = _build(name), _build(name, dim=wide)
    assert (network.num_features, wider.num_features) == (own, wide)
    assert (_shape(network, 32), _shape(wider, 32)) == ((2, own), (2, wide))
    assert _count(network) == count and expanded in (None, _count(wider))


def test_expanded_stems():
    """64 pixels keep the max-pool and lose the stride; 32 pixels lose both."""
    seen = {}
    for options, pixels in (({"stem": "3x3"}, 64), ({"cifar": True}, 32), ({}, 128)):
        network = _build("expanded_resnet18", **options)
        network.layer1.register_forward_hook(lambda module, inputs, output: seen.update({"size": output.shape[2:]}))
        _shape(network, pixels)
        assert seen["size"] == (32, 32), options


# parameters without classifier of Self-Supervised-Vision's networks
STEM_3X3 = {
    "resnet18": 11_168_832,
    "resnet50": 23_500_352,
    "resnext50": 22_972_224,
    "resnext101": 86_734_656,
    "wide_resnet50": 66_826_560,
    "wide_resnet101": 124_830_016,
}


@pytest.mark.sample("resnet18")
@pytest.mark.parametrize("name", sorted(STEM_3X3))
def test_stem_3x3_keeps_the_max_pool(name, unset_weights):
    """Also of solo-learn's own ResNets, whose stem its classes would replace for CIFAR."""
    network = build_backbone(name, {"stem": "3x3"}, "cifar10", 32)
    assert _count(network) == STEM_3X3[name]
    sizes = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        stage.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-1]))
    _shape(network.to("meta"), 32)
    assert sizes == [16, 8, 4, 2]


def test_stem_of_a_teacher_is_that_of_the_student():
    from omegaconf import OmegaConf

    from solo_ext.compat import BaseMomentumMethod

    torch.manual_seed(0)
    cfg = {
        "method": "base",
        "backbone": {"name": "resnet18", "kwargs": {"stem": "3x3"}},
        "data": {"dataset": "cifar10", "num_classes": 2, "num_large_crops": 2, "num_small_crops": 0},
        "augmentations": [{"crop_size": 32}],
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": 2, "lr": 0.0, "weight_decay": 0.0, "classifier_lr": 0.0},
        "scheduler": {"name": "none"},
    }
    model = BaseMomentumMethod(OmegaConf.create(cfg))
    student, teacher = model.backbone.conv1, model.momentum_backbone.conv1
    assert student.kernel_size == teacher.kernel_size == (3, 3) and student.padding == (1, 1)
    assert torch.equal(student.weight, teacher.weight) and student.weight.requires_grad
    assert not teacher.weight.requires_grad
    # torchvision's initialisation: variance 2 / (64 * 9)
    assert abs(student.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 2e-3


@pytest.mark.parametrize(
    ("name", "stem", "sentence"),
    [
        ("resnet18", "5x5", "backbone.kwargs: stem must be one of 7x7, 3x3, cifar, got '5x5'"),
        ("vit_tiny", "3x3", "backbone.kwargs: stem=3x3 is not available for a VisionTransformer; remove stem"),
        ("regnet_y_400mf", "7x7", "backbone.kwargs: stem=7x7 is not available for a RegNet; remove stem"),
    ],
)
def test_stem_mistakes(name, stem, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        build_backbone(name, {"stem": stem}, "cifar10", 32)


def test_vit_of_self_supervised_vision():
    """6 blocks of 384: the input, positions of 64 and 4 patches, and LayerNorm, attention and MLP in each block."""
    network = build_backbone("ssv_vit", {}, "cifar10", 32)
    block = 4 * 384 + 3 * 384**2 + 2 * 384 * 768 + 768 + 384
    assert _count(network) == 48 + (65 + 5) * 192 + (48 + 192) * 384 + 384 + 6 * block
    assert _shape(network, 32) == _shape(network, 8) == (2, 384)
    with pytest.raises(ValueError, match="have 16 patches of 4 pixels, but the network has positions for"):
        _shape(network, 16)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dim": 700}, "backbone expanded_resnet18: dim must be a multiple of the backbone's 512 or below it, got 700"),
        ({"stem": "5x5"}, "stem of backbone expanded_resnet18 must be one of 7x7, 3x3, cifar, got '5x5'"),
        ({"width": 3}, "width"),
    ],
)
def test_expanded_mistakes(options, sentence):
    with pytest.raises(TypeError, match=sentence):
        _build("expanded_resnet18", **options)


@pytest.mark.sample("resnet34", "wide_resnet50", "regnet_y_400mf")
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_width_and_number_of_parameters(name, unset_weights):
    width, weights = PUBLISHED[name]
    network = _build(name)
    assert network.num_features == width
    assert _shape(network, 32) == (2, width)
    assert isinstance(network.fc, nn.Identity)
    # the published count is with a classifier of 1000 classes
    assert _count(network) == weights.DEFAULT.meta["num_params"] - (width * 1000 + 1000)


@pytest.mark.parametrize("name", ["resnet34", "resnext50", "wide_resnet50"])
def test_resnet_stem_of_cifar(name):
    network = _build(name, cifar=True)
    seen = {}
    network.layer1.register_forward_hook(lambda module, inputs, output: seen.update(first=output.shape[2:]))
    network.layer4.register_forward_hook(lambda module, inputs, output: seen.update(last=output.shape[2:]))
    assert _shape(network, 32) == (2, network.num_features)
    # 32 + 2·2 - 2 = 34 pixels, then halved three times, rounding up
    assert seen == {"first": (34, 34), "last": (5, 5)}
    # 64 filters of 3·7·7 become 64 of 3·3·3
    assert _count(_build(name)) - _count(network) == 64 * 3 * (49 - 9)


def test_regnet_stem_of_cifar():
    network = _build("regnet_y_400mf", cifar=True)
    seen = {}
    network.stem.register_forward_hook(lambda module, inputs, output: seen.update(stem=output.shape[2:]))
    network.trunk_output.register_forward_hook(lambda module, inputs, output: seen.update(last=output.shape[2:]))
    assert _shape(network, 32) == (2, 440)
    # four stages, each halves
    assert seen == {"stem": (32, 32), "last": (2, 2)}
    assert _count(network) == _count(_build("regnet_y_400mf"))


@pytest.mark.parametrize("name", [name for name in sorted(PUBLISHED) if "resnet" in name])
def test_come_out_right_of_the_hosts_own_surgery(name):
    """solo-learn reads ``inplanes`` of a ResNet and replaces its classifier and its stem itself."""
    network = _build(name, cifar=True)
    assert network.inplanes == network.num_features
    ours = network.conv1
    assert (ours.in_channels, ours.out_channels, ours.kernel_size, ours.stride, ours.padding, ours.bias) == (
        *(3, 64, (3, 3), (1, 1), (2, 2), None),
    )
    assert isinstance(network.maxpool, nn.Identity)


def test_hosts_read_the_width_of_resnet8_where_they_look_first():
    """solo-learn's linear evaluation takes ``inplanes`` before ``num_features``."""
    network = _build("resnet8")
    assert network.inplanes == network.num_features == 64


def test_options_reach_the_network():
    network = ARCHITECTURES["resnet34"]("byol", zero_init_residual=True)
    assert all((block.bn2.weight == 0).all() for block in network.layer3)
    assert all((block.bn2.weight == 1).all() for block in ARCHITECTURES["resnet34"]("byol").layer3)


@pytest.mark.parametrize("name", ["resnext50", "regnet_y_400mf"])
@pytest.mark.parametrize("key", ["zero_init_residuals", "weights", "num_classes"])
def test_an_unknown_option_is_named(name, key):
    with pytest.raises(TypeError, match=f"backbone {name} has no option '{key}'; known options:"):
        _build(name, **{key: 1})


@pytest.mark.slow
def test_features_and_gradients_are_finite():
    torch.manual_seed(0)
    for name in ("regnet_y_400mf", "resnext50"):
        network = ARCHITECTURES[name]("ssl_ey", cifar=True)
        features = network(torch.randn(4, 3, 32, 32))
        assert features.isfinite().all() and features.std(dim=0).mean() > 1e-3
        features.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.sample("cifar10-resnet34", "custom-regnet_y_400mf")
@pytest.mark.parametrize("name", ["resnet34", "wide_resnet50", "regnet_y_400mf"])
@pytest.mark.parametrize("dataset", ["cifar10", "custom"])
def test_the_host_builds_student_and_teacher(name, dataset, unset_weights):
    from omegaconf import OmegaConf

    from solo_ext.backbones import build_backbone
    from solo_ext.compat import BaseMomentumMethod

    cfg = {
        "method": "base",
        "backbone": {"name": name, "kwargs": {}},
        "data": {"dataset": dataset, "num_classes": 3, "num_large_crops": 2, "num_small_crops": 0},
        "augmentations": [{"crop_size": 32}],
        "max_epochs": 1,
        "optimizer": {"name": "sgd", "batch_size": 2, "lr": 0.0, "weight_decay": 0.0, "classifier_lr": 0.0},
        "scheduler": {"name": "none"},
    }
    method = BaseMomentumMethod(OmegaConf.create(cfg))
    expected = ARCHITECTURES[name]("base", cifar=dataset == "cifar10")
    for network in (method.backbone, method.momentum_backbone, build_backbone(name, {}, dataset, 32)):
        assert repr(network) == repr(expected)
    assert method.features_dim == method.classifier.in_features == expected.num_features


@pytest.mark.slow
def test_evaluations_read_files_of_vicregs_scripts_exports_and_other_frameworks(tmp_path: Path) -> None:
    """main_linear, main_knn and main_probe load a backbone with the same function as the export."""
    network = models.resnet18()
    network.fc = nn.Identity()
    state = network.state_dict()
    trunk = {f"_feature_blocks.{name}": value for name, value in state.items()}
    files = {
        "model.pth": {"epoch": 1, "model": {f"module.backbone.{name}": value for name, value in state.items()}},
        "resnet50.pth": state,
        "checkpoint.torch": {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        backbone = build_backbone("resnet18", {}, "imagenet", 224)
        load_backbone(tmp_path / name, backbone)
        assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items()), name
    torch.save({"model": {"module.projector.0.weight": torch.zeros(1)}}, tmp_path / "head.pth")
    with pytest.raises(
        UserError, match=r"head\.pth contains no backbone: none of its parts projector is named backbone"
    ):
        load_backbone(tmp_path / "head.pth", backbone)


@pytest.mark.slow
@torch.no_grad()
def test_every_backbone_is_exported_whole_and_alone(tmp_path: Path) -> None:
    """From the checkpoint of a compiled model too; the weights are views of one number, whatever the network's size."""
    number, read = torch.tensor(0.0), 0
    for name in backbones():
        try:
            with torch.device("meta"):
                backbone = build_backbone(name, {}, "custom", 224)
        except (RuntimeError, NotImplementedError):
            continue  # it computes with the values of tensors
        state = {key: number.to(value.dtype).expand(value.shape) for key, value in backbone.state_dict().items()}
        for prefix in ("backbone.", "_orig_mod.backbone.", "backbone._orig_mod."):
            around = prefix.removesuffix("backbone._orig_mod.").removesuffix("backbone.")
            weights = {f"{prefix}{key}": value for key, value in state.items()}
            others = {f"{around}momentum_backbone.{key}": value for key, value in state.items()}
            path = tmp_path / "run.ckpt"
            torch.save({"state_dict": {**weights, **others}}, path)
            found = read_backbone(path)
            assert found.state.keys() == state.keys(), name
            assert found.dropped == {"momentum_backbone": len(state)}, name
        read += 1
    assert read > 20


def test_a_compiled_backbone_is_loaded_and_another_one_is_refused(tmp_path: Path) -> None:
    one, other = (build_backbone(name, {}, "cifar10", 32) for name in ("resnet18", "resnet34"))
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": {f"_orig_mod.backbone.{key}": v for key, v in one.state_dict().items()}}, path)
    with pytest.raises(UserError, match=r"missing layer1\.2\.conv1\.weight and 95 more.* a network of another depth"):
        load_backbone(path, other)
    again = build_backbone("resnet18", {}, "cifar10", 32)
    load_backbone(path, again)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in one.state_dict().items())
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in other.state_dict().items()}}, path)
    with pytest.raises(UserError, match=r"unexpected layer1\.2\.conv1\.weight and 95 more.* of another depth"):
        load_backbone(path, one)


STEMS = {"of solo-learn": "{}", "3x3 with a max-pool": "{stem: 3x3}", "3x3": "{stem: cifar}"}


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_the_stem_of_a_checkpoint_is_kept(stem: str, compose, tmp_path: Path, differing_loads) -> None:
    """Its padding and max-pool are in no tensor: in our checkpoints, in earlier ones, and in those of stock scripts."""
    from solo_ext.checkpoint import Checkpointer, find_checkpoint, read_checkpoint
    from solo_ext.config import parse_pretrain
    from solo_ext.registry import method_class

    cfg = parse_pretrain(compose("ssl_ey", "backbone.name=resnet18", f"++backbone.kwargs={STEMS[stem]}"))
    cfg.data.dataset = "cifar10"
    torch.manual_seed(0)
    model = method_class(cfg)(cfg)
    Checkpointer(cfg, tmp_path).save_weights(model)
    content = read_checkpoint(find_checkpoint(tmp_path))
    assert content["stem"]["padding"] == (2 if stem == "of solo-learn" else 1)
    assert differing_loads(content, model.backbone) == []
    assert differing_loads({key: content[key] for key in ("state_dict", "solo_ext")}, model.backbone) == []
    stock: dict = {"state_dict": content["state_dict"]}
    if stem == "of solo-learn":
        assert differing_loads(stock, model.backbone) == []
    model.on_save_checkpoint(stock)  # our methods in stock scripts
    assert differing_loads(stock, model.backbone) == []


def test_an_evaluation_has_the_stem_of_the_training(tmp_path: Path) -> None:
    """That of a file of lightly has padding 1, that of solo-learn's networks for CIFAR padding 2."""
    theirs = build_backbone("resnet18", {"stem": "3x3"}, "custom", 32).eval()
    state = {f"backbone.{name}": value for name, value in theirs.state_dict().items()}
    record = {"stride": 1, "padding": 1, "pool": True}
    torch.save({"state_dict": state, "stem": record}, tmp_path / "run.ckpt")
    ours = build_backbone("resnet18", {}, "cifar10", 32).eval()
    assert ours.conv1.padding == (2, 2)
    load_backbone(tmp_path / "run.ckpt", ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
