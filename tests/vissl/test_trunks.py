"""ResNet trunks: torchvision's function, VISSL's interface."""

from typing import Any

import pytest
import torch
from torchvision.models import resnet
from vissl.models import build_model
from vissl.models.trunks import get_model_trunk
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from plugins.heads import expand_resnet_dim
from plugins.tools.command import UserError
from vissl_ext.registry import register

register()
pytestmark = pytest.mark.vissl


def model_config(*overrides: str) -> Any:
    words = ["config=pretrain/isoloss/digits", *overrides]
    return convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1].MODEL


def trunk(*overrides: str) -> Any:
    torch.manual_seed(0)
    return get_model_trunk("plain_resnet")(model_config(*overrides), "plain_resnet")


@pytest.mark.parametrize(("depth", "width"), [(18, 512), (34, 512), (50, 2048)])
def test_computes_what_torchvision_computes(depth: int, width: int) -> None:
    ours = trunk(f"config.MODEL.TRUNK.RESNETS.DEPTH={depth}").eval()
    torch.manual_seed(0)
    theirs = getattr(resnet, f"resnet{depth}")(weights=None).eval()
    theirs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 40, 40)
    (features,) = ours(images, [])
    assert features.shape == (2, width) == (2, ours.num_features)
    torch.testing.assert_close(features, theirs(images))


def test_cifar_stem_is_that_of_solo_learn() -> None:
    """3×3, stride 1, padding 2, no pool: 32 pixels become 34, and the last stage has 5."""
    ours = trunk("+config.MODEL.TRUNK.RESNETS.CIFAR_STEM=true")
    stem = ours._feature_blocks["conv1"]
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (2, 2), None)
    pooled, last = ours(torch.randn(2, 3, 32, 32), ["res1", "res5"])
    assert pooled.shape == (2, 64, 34, 34)
    assert last.shape == (2, 512, 5, 5)


def test_features_of_any_width_are_those_of_the_expanded_resnet() -> None:
    ours = trunk("+config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW=[512,512,1024]").eval()
    theirs = expand_resnet_dim(resnet.resnet18(weights=None), 1024, bottleneck=512).eval()
    state = {key.removeprefix("_feature_blocks."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key.replace("resizer.", "avgpool.0."): value for key, value in state.items()})
    images = torch.randn(2, 3, 40, 40)
    narrow, wide, features = ours(images, ["res5", "resizer", "flatten"])
    assert (narrow.shape[1], wide.shape[1], features.shape, ours.num_features) == (512, 1024, (2, 1024), 1024)
    torch.testing.assert_close(features, theirs(images))


def test_weights_of_vissls_own_trunk_fit() -> None:
    config = model_config("config.MODEL.TRUNK.RESNETS.DEPTH=50", "config.MODEL.TRUNK.NAME=resnet")
    torch.manual_seed(1)
    stock = get_model_trunk("resnet")(config, "resnet").eval()
    ours = trunk("config.MODEL.TRUNK.RESNETS.DEPTH=50").eval()
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(2, 3, 40, 40)
    for name in ("res2", "res5", "flatten"):
        torch.testing.assert_close(ours(images, [name])[0], stock(images, [name])[0])


def test_what_it_cannot_be_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"RESNETS.DEPTH of plain_resnet is one of 18, 34, 50, 101, 152, got 20"):
        trunk("config.MODEL.TRUNK.RESNETS.DEPTH=20")
    with pytest.raises(UserError, match=r"RESNETS.WIDTH_MULTIPLIER of plain_resnet is 1, got 2"):
        trunk("config.MODEL.TRUNK.RESNETS.WIDTH_MULTIPLIER=2")
    for widths, message in (("[2048,512,8192]", r"is \[512, inner width, new width\]"), ("[512,512,700]", "got 700")):
        with pytest.raises(UserError, match=f"RESNETS.Z_DIM_OLD_TMP_NEW.*{message}"):
            trunk(f"+config.MODEL.TRUNK.RESNETS.Z_DIM_OLD_TMP_NEW={widths}")


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
