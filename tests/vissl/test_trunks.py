"""ResNet trunks: torchvision's function, VISSL's interface."""

import copy
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
from timm.models.convit import ConVit
from timm.models.convnext import ConvNeXt
from timm.models.xcit import Xcit
from torchvision.models import regnet, resnet
from torchvision.models.vision_transformer import VisionTransformer
from vissl.models import build_model
from vissl.models.trunks import get_model_trunk
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from plugins.heads import expand_resnet_dim
from plugins.tools.backbones import BACKBONES
from plugins.tools.command import UserError
from plugins.tools.export import export, read_backbone
from plugins.tools.hub import load_weights
from plugins.tools.library_names import library_names
from plugins.tools.regnet import regnet_y
from plugins.tools.resnet8 import resnet8
from plugins.tools.stems import stem_record
from vissl_ext.compose import compose
from vissl_ext.defaults import adapt
from vissl_ext.parts import check_layers
from vissl_ext.registry import register
from vissl_ext.trunks import check_trunk, trunk_width

register()
pytestmark = pytest.mark.vissl


def model_config(*overrides: str) -> Any:
    words = ["config=pretrain/isoloss/digits", "config.MODEL.TRUNK.RESNETS.DEPTH=18", *overrides]
    return convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1].MODEL


def trunk(*overrides: str) -> Any:
    torch.manual_seed(0)
    return get_model_trunk("plain_resnet")(model_config(*overrides), "plain_resnet")


@pytest.mark.sample("18-512")
@pytest.mark.parametrize(("depth", "width"), [(18, 512), (34, 512), (50, 2048)])
def test_computes_what_torchvision_computes(depth: int, width: int) -> None:
    ours = trunk(f"config.MODEL.TRUNK.RESNETS.DEPTH={depth}").eval()
    torch.manual_seed(0)
    theirs = getattr(resnet, f"resnet{depth}")(weights=None).eval()
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 40, 40)
    (features,) = ours(images, [])
    assert features.shape == (2, width) == (2, ours.num_features)
    torch.testing.assert_close(features, theirs(images), rtol=1e-4, atol=1e-4)


def test_resnet8_is_that_of_the_other_frameworks() -> None:
    ours = trunk("config.MODEL.TRUNK.RESNETS.DEPTH=8").eval()
    torch.manual_seed(0)
    theirs = resnet8().eval()
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 16, 16)
    res2, res4, features = ours(images, ["res2", "res4", "flatten"])
    assert (res2.shape, res4.shape, ours.num_features) == ((2, 16, 16, 16), (2, 64, 4, 4), 64)
    torch.testing.assert_close(features, theirs(images))


def test_cifar_stem_is_that_of_solo_learn() -> None:
    """3×3, stride 1, padding 2, no pool: 32 pixels become 34, and the last stage has 5."""
    ours = trunk("+config.MODEL.TRUNK.RESNETS.CIFAR_STEM=true")
    stem = ours._feature_blocks["conv1"]
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (2, 2), None)
    pooled, last = ours(torch.randn(2, 3, 32, 32), ["res1", "res5"])
    assert pooled.shape == (2, 64, 34, 34)
    assert last.shape == (2, 512, 5, 5)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 18])
def test_the_stem_of_a_checkpoint_is_kept(depth: int, differing_loads: Callable) -> None:
    """Its padding is in no tensor: with the record of a run's checkpoint, and without, as earlier releases wrote it."""
    ours = trunk("+config.MODEL.TRUNK.RESNETS.CIFAR_STEM=true", f"config.MODEL.TRUNK.RESNETS.DEPTH={depth}")
    network = torch.nn.Sequential(*ours._feature_blocks.values())
    state = {"base_model": {"model": {"trunk": ours.state_dict(), "heads": {}}}}
    contents = [{"classy_state_dict": {**state, **stem_record(ours)}}, {"classy_state_dict": state}]
    for content in contents[: 1 if depth == 8 else 2]:
        assert differing_loads(content, network, "resnet8" if depth == 8 else None) == []


def test_features_of_any_width_are_those_of_the_expanded_resnet() -> None:
    ours = trunk("+config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW=[512,512,1024]").eval()
    theirs = expand_resnet_dim(resnet.resnet18(weights=None), 1024, bottleneck=512).eval()
    state = {key.removeprefix("_feature_blocks."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key.replace("resizer.", "avgpool.0."): value for key, value in state.items()})
    images = torch.randn(2, 3, 40, 40)
    narrow, wide, features = ours(images, ["res5", "resizer", "flatten"])
    assert (narrow.shape[1], wide.shape[1], features.shape, ours.num_features) == (512, 1024, (2, 1024), 1024)
    torch.testing.assert_close(features, theirs(images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_weights_of_vissls_trunk_can_be_loaded() -> None:
    config = model_config("config.MODEL.TRUNK.RESNETS.DEPTH=50", "config.MODEL.TRUNK.NAME=resnet")
    torch.manual_seed(1)
    stock = get_model_trunk("resnet")(config, "resnet").eval()
    ours = trunk("config.MODEL.TRUNK.RESNETS.DEPTH=50").eval()
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(2, 3, 40, 40)
    for name in ("res2", "res5", "flatten"):
        torch.testing.assert_close(ours(images, [name])[0], stock(images, [name])[0], rtol=1e-4, atol=1e-4)


def test_invalid_options_raise_a_one_line_error() -> None:
    with pytest.raises(UserError, match=r"DEPTH of plain_resnet must be one of 8, 18, 34, 50, 101, 152, got 20"):
        trunk("config.MODEL.TRUNK.RESNETS.DEPTH=20")
    with pytest.raises(UserError, match=r"RESNETS.WIDTH_MULTIPLIER of plain_resnet must be 1, got 2"):
        trunk("config.MODEL.TRUNK.RESNETS.WIDTH_MULTIPLIER=2")
    for widths, message in (
        ("[2048,512,8192]", r"\[512, bottleneck, new width\]"),
        ("[512,512,700]", "got 700"),
    ):
        with pytest.raises(UserError, match=f"RESNETS.Z_DIM_OLD_TMP_NEW.*{message}"):
            trunk(f"+config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW={widths}")


@pytest.mark.slow
def test_activation_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    images, gradients = torch.randn(2, 3, 40, 40), []
    for switch in ("true", "false"):
        ours = trunk(f"config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING={switch}")
        ours(images.clone(), [])[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


_REGNET = "{depth:4,w_0:8,w_a:8.0,w_m:2.0,group_width:8,bn_epsilon:1e-05,bn_momentum:0.1}"


@pytest.mark.sample("overrides1")
@pytest.mark.parametrize(
    "overrides",
    [
        ["config.MODEL.TRUNK.NAME=resnet", "config.MODEL.TRUNK.RESNETS.DEPTH=50"],
        ["config.MODEL.TRUNK.NAME=regnet", f"+config.MODEL.TRUNK.REGNET={_REGNET}"],
    ],
)
def test_stock_trunks_train_without_apex(overrides: list[str]) -> None:
    """Forward and backward on a CPU, with VISSL's MLP head."""
    config = model_config(*overrides)
    width = get_model_trunk(config.TRUNK.NAME)(config, "")(torch.randn(2, 3, 64, 64), [])[0].flatten(1).shape[1]
    config.HEAD.PARAMS = [["mlp", {"dims": [width, 4]}]]
    config._MODEL_INIT_SEED = 0
    model = build_model(config, {})
    (output,) = model(torch.randn(2, 3, 64, 64))
    output.sum().backward()
    assert output.shape == (2, 4)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


_SEER = Path(__file__).parents[2] / "configs/vissl/config/pretrain/seer/imagenet_rn50.yaml"


@pytest.mark.parametrize("name", ["32Gf", "256Gf"])
def test_regnets_of_seer_have_the_width_of_its_head(name: str) -> None:
    """The overrides in the comments of SEER's file; the same widths as in the other frameworks."""
    (line,) = [line for line in _SEER.read_text().splitlines() if line.startswith(f"# RegNetY-{name}: ")]
    words = ["config=pretrain/seer/imagenet_rn50", *shlex.split(line.partition(": ")[2])]
    model = convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1].MODEL
    with torch.device("meta"):
        (features,) = get_model_trunk("regnet")(model, "regnet")(torch.zeros(2, 3, 32, 32), [])
        ours = regnet_y(f"regnet_y_{name.lower()}")
    ((kind, options),) = model.HEAD.PARAMS
    assert (kind, options["in_dim"]) == ("method_head", ours.fc.in_features)
    assert features.flatten(1).shape == (2, options["in_dim"])


# every trunk that trains: evaluation and export

_TRUNK = "config.MODEL.TRUNK"
_TOKENS = ["IMAGE_SIZE=32", "PATCH_SIZE=16", "NUM_LAYERS=2", "NUM_HEADS=2", "HIDDEN_DIM=16"]
_VIT = [f"{_TRUNK}.VISION_TRANSFORMERS.{word}" for word in (*_TOKENS, "MLP_DIM=64")]
_EFFICIENT = "{model_version:B0,bn_momentum:0.01,bn_epsilon:0.001,drop_connect_rate:0.2,width_divisor:8,min_width:null}"
_ALEXNET = ("alexnet_deepcluster", "alexnet_jigsaw", "alexnet_rotnet")
TINY = {
    "resnet": ([f"{_TRUNK}.RESNETS.DEPTH=50"], ["res2", "flatten"]),
    "plain_resnet": ([], ["res2", "flatten"]),
    "vision_transformer": (_VIT, ["concatCLS2"]),
    "deit": ([*_VIT, f"{_TRUNK}.VISION_TRANSFORMERS.DROP_PATH_RATE=0.1"], ["blkCLS0", "lastCLS"]),
    "convit": ([*_VIT, f"{_TRUNK}.CONVIT.N_GPSA_LAYERS=1", f"{_TRUNK}.CONVIT.LOCALITY_DIM=3"], ["lastCLS"]),
    "xcit": ([f"{_TRUNK}.XCIT.{word}" for word in _TOKENS], ["lastCLS"]),
    "regnet": ([f"+{_TRUNK}.REGNET={_REGNET}"], ["res3", "flatten"]),
    "efficientnet": ([f"+{_TRUNK}.EFFICIENT_NETS={_EFFICIENT[:-1]},use_se:true}}"], ["block0", "flatten"]),
    "convnext": ([f"{_TRUNK}.CONVNEXT.DEPTH=[1,1,1,1]", f"{_TRUNK}.CONVNEXT.DIMS=[4,4,8,8]"], ["flatten"]),
    "amdim_encoder": ([f"{_TRUNK}.AMDIM_ENCODER.{word}" for word in ("NDF=2", "N_RKHS=16", "N_DEPTH=1")], ["flatten"]),
    "wrn_28_2_gn": ([], ["flatten"]),
    **{name: ([], ["conv1", "conv5"]) for name in _ALEXNET},
}
"""Trunk → a small one, and names of features. alexnet_bvlc cannot run in VISSL; alexnet_colorization takes LAB."""
_OF_LIBRARY = {
    "resnet": ("torchvision", resnet.resnet50),
    "plain_resnet": ("torchvision", resnet8),
    "regnet": (
        "torchvision",
        lambda: regnet.RegNet(regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 8, se_ratio=0.25)),
    ),
    "vision_transformer": ("torchvision", partial(VisionTransformer, 32, 16, 2, 2, 16, 64)),
    "deit": ("timm", partial(timm.models.VisionTransformer, 32, 16, embed_dim=16, depth=2, num_heads=2)),
    "convit": (
        "timm",
        partial(ConVit, 32, 16, norm_layer=torch.nn.LayerNorm, embed_dim=8, depth=2, num_heads=2, local_up_to_layer=1),
    ),
    "xcit": ("timm", partial(Xcit, 32, 16, embed_dim=16, depth=2, num_heads=2, eta=1.0, tokens_norm=True)),
    "wrn_28_2_gn": ("torchvision", BACKBONES["wrn_28_2_gn"]),
    "convnext": ("timm", partial(ConvNeXt, depths=(1, 1, 1, 1), dims=(4, 4, 8, 8))),
}


def evaluation_config(name: str, layers: list[str]) -> Any:
    """The MODEL section of an evaluation of those features."""
    own = "vision_transformer" if name == "deit" else name
    entries = ",".join(f"[{layer},[Identity,[]]]" for layer in layers)
    key = "config.MODEL.FEATURE_EVAL_SETTINGS.LINEAR_EVAL_FEAT_POOL_OPS_MAP"
    bias = [f"{_TRUNK}.VISION_TRANSFORMERS.QKV_BIAS=true"] if own == "vision_transformer" else []
    words = [f"{_TRUNK}.NAME={own}", *bias, *TINY[name][0], f"{key}=[{entries}]"]
    return convert_to_attrdict(compose(["config=feature_extraction/digits/extract", *words])[0], dump_config=False)[1]


@pytest.mark.sample("plain_resnet", "convnext")
@pytest.mark.parametrize("name", TINY)
def test_every_trunk_that_trains_can_be_evaluated_and_exported(name: str, tmp_path: Path) -> None:
    config = evaluation_config(name, TINY[name][1])
    check_layers(config.MODEL)
    torch.manual_seed(0)
    trained = get_model_trunk(config.MODEL.TRUNK.NAME)(copy.deepcopy(config.MODEL), "").eval()
    with torch.no_grad():
        for key, value in trained.state_dict().items():  # so that no statistics and no zeros are those of a new one
            if value.is_floating_point():
                value.add_(0.02 * torch.rand_like(value) + (0.1 if "running_var" in key else 0))
    model = {"trunk": trained.state_dict(), "heads": {"0.weight": torch.zeros(2, 3)}}
    path = tmp_path / "model.torch"
    torch.save({"classy_state_dict": {"base_model": {"model": model}}}, path)

    config.MODEL.WEIGHTS_INIT.PARAMS_FILE = str(path)
    config.MODEL._MODEL_INIT_SEED = 0
    evaluated = build_model(copy.deepcopy(config.MODEL), {}).eval()
    evaluated.init_model_from_weights_params_file(config, torch.load(path))
    images = torch.randn(2, 3, 224 if "alexnet" in name else 32, 224 if "alexnet" in name else 32)
    with torch.no_grad():
        features = trained(images, TINY[name][1])
        for one, other in zip(features, evaluated(images), strict=True):
            torch.testing.assert_close(one.flatten(1), other.flatten(1), rtol=1e-4, atol=1e-4)
        last = trained(images, [])[-1]

    assert export(path, "safetensors", tmp_path / "x.safetensors").endswith("dropped: heads (1)")
    state = read_backbone(path).state
    assert len(state) == len(model["trunk"])
    if name in _OF_LIBRARY:
        library, make = _OF_LIBRARY[name]
        theirs = make().eval()
        for head in ("fc", "head", "heads"):
            if hasattr(theirs, head) and not isinstance(theirs, ConvNeXt):
                setattr(theirs, head, torch.nn.Identity())
        if isinstance(theirs, ConvNeXt):
            theirs.head.fc = torch.nn.Identity()
        theirs.load_state_dict(library_names(state, library))
        with torch.no_grad():
            torch.testing.assert_close(theirs(images), last.flatten(1), rtol=1e-4, atol=1e-5)


_STEM = "config.MODEL.TRUNK.RESNETS."


@pytest.fixture(scope="module")
def stem_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of a ResNet-18 with padding 1 and a max-pool: a checkpoint of VISSL, and an export."""
    folder = tmp_path_factory.mktemp("stems")
    network = trunk(*(f"+{_STEM}{entry}" for entry in ("CIFAR_STEM=true", "STEM_PADDING=1", "STEM_POOL=true")))
    model = {"trunk": network.state_dict(), "heads": {}}
    torch.save({"classy_state_dict": {"base_model": {"model": model}, **stem_record(network)}}, folder / "vissl.torch")
    export(folder / "vissl.torch", "torchvision", folder / "export.pth")
    return {path.name: path for path in folder.iterdir()}


def _initialised(path: Path, *stem: str) -> torch.nn.Module:
    """A model with the weights of a file, in evaluation mode."""
    config = evaluation_config("plain_resnet", ["res5avg"])
    config.MODEL.TRUNK.RESNETS = model_config(*(f"+{_STEM}{entry}" for entry in stem)).TRUNK.RESNETS
    weights = config.MODEL.WEIGHTS_INIT
    weights.PARAMS_FILE, config.MODEL._MODEL_INIT_SEED = str(path), 0
    if path.suffix == ".pth":
        weights.STATE_DICT_KEY_NAME, weights.APPEND_PREFIX = "", "trunk.base_model._feature_blocks."
    check_trunk(config.MODEL)
    model = build_model(config.MODEL, {})
    model.init_model_from_weights_params_file(config, torch.load(path))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vissl.torch", "export.pth"])
def test_the_stem_of_weights_is_that_of_the_trunk(name: str, stem_files: dict[str, Path]) -> None:
    """If it is another, the message has the options that make it right; the features are those of the run then."""
    with pytest.raises(UserError) as refused:
        _initialised(stem_files[name], "CIFAR_STEM=true")
    said = str(refused.value)
    assert "\n" not in said and f"{name} was trained with another stem (stride 1, padding 1, a max-pool)" in said
    assert "than that of config.MODEL.TRUNK (stride 1, padding 2, no max-pool)" in said
    words = [word.removeprefix(_STEM) for word in said.split() if word.startswith(_STEM)]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        (features,) = _initialised(stem_files[name], *words)(images)
        torch.testing.assert_close(features.flatten(1), load_weights(stem_files[name])(images), rtol=1e-4, atol=1e-5)


def test_options_of_a_stem_are_checked() -> None:
    for entries, message in (
        (("CIFAR_STEM=true", "STEM_PADDING=-1"), "RESNETS.STEM_PADDING must be an integer, at least 0, got -1"),
        (("CIFAR_STEM=true", "STEM_STRIDE=0"), "RESNETS.STEM_STRIDE must be an integer, at least 1, got 0"),
        (("CIFAR_STEM=true", "STEM_POOL=2"), "RESNETS.STEM_POOL must be true or false, got 2"),
        (("STEM_POOL=true",), "RESNETS.STEM_POOL has no effect without RESNETS.CIFAR_STEM=true"),
    ):
        with pytest.raises(UserError, match=message):
            check_trunk(model_config(*(f"+{_STEM}{entry}" for entry in entries)))


@pytest.mark.slow
def test_features_that_a_trunk_does_not_have_are_an_error() -> None:
    for name, layers, message in (
        (
            "deit",
            ["lastcls"],
            "'lastcls' is unknown; allowed: lastCLS, blkCLS0 to blkCLS1",
        ),
        ("deit", ["blkCLS2"], "'blkCLS2' is unknown"),
        ("regnet", ["res9"], "layer of regnet: 'res9' is unknown"),
        ("convit", ["blkCLS0"], "convit returns only its last features"),
        ("convnext", ["a", "b"], "convnext returns only its last features"),
    ):
        with pytest.raises(UserError, match=message):
            check_layers(evaluation_config(name, layers).MODEL)


@pytest.mark.parametrize("name", ["regnet_v2", "regnet_fsdp"])
def test_trunks_that_need_a_gpu_raise_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["config=feature_extraction/digits/extract", f"{_TRUNK}.NAME={name}"]
    with pytest.raises(UserError, match=f"{_TRUNK}.NAME={name} needs a GPU"):
        adapt(*compose(words))


@pytest.mark.slow
def test_every_backbone_is_a_trunk_with_its_options() -> None:
    """Its width is known before it is built, and the options are those of its section."""
    widths = {"amdim_encoder": 1024, "resnet8": 64, "resnet161_v2_stacks": 4096, "wrn_28_2_gn": 128, "resnet50x2": 4096}
    for name in BACKBONES:
        config = model_config(f"{_TRUNK}.NAME={name}")
        with torch.device("meta"):
            built = get_model_trunk(name)(config, name)
        assert trunk_width(config) == built.num_features == widths.get(name, built.num_features)
    section = f"+{_TRUNK}.AMDIM_ENCODER"
    for option, message in (
        ("{NRKHS:16}", "AMDIM_ENCODER: 'NRKHS' is unknown, did you mean 'N_RKHS'"),
        ("{SIZE:96}", "AMDIM_ENCODER: size must be one of 32, 64, 128, got 96"),
    ):
        with pytest.raises(UserError, match=message):
            check_trunk(model_config(f"{_TRUNK}.NAME=amdim_encoder", f"{section}={option}"))
