"""ResNets of any width: torchvision's at width 1, and their sizes at others."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck

from plugins.tools.backbones import BACKBONES
from plugins.tools.export import Backbone, fit
from plugins.tools.wide_resnet import LAYERS, wide_resnet


def _count(depth: int, width: int) -> int:
    """The number of parameters without the classifier, counted layer by layer."""

    def norm(channels: int) -> int:
        return 2 * channels

    entering, total = 64 * width, 3 * 49 * 64 * width + norm(64 * width)
    for stage, blocks in enumerate(LAYERS[depth]):
        inner = 64 * width * 2**stage
        for _ in range(blocks):
            total += entering * inner + 9 * inner**2 + inner * 4 * inner + 2 * norm(inner) + norm(4 * inner)
            if entering != 4 * inner:
                total += entering * 4 * inner + norm(4 * inner)
            entering = 4 * inner
    return total


@pytest.mark.parametrize(
    ("name", "depth", "width"),
    [
        ("resnet50x2", 50, 2),
        ("resnet50x4", 50, 4),
        ("resnet50x5", 50, 5),
        ("resnet200", 200, 1),
        ("resnet200x2", 200, 2),
    ],
)
def test_number_of_parameters_and_width_of_the_features(name: str, depth: int, width: int) -> None:
    with torch.device("meta"):
        network = BACKBONES[name]()
        network.fc = nn.Identity()
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 2048 * width)
    assert sum(parameter.numel() for parameter in network.parameters()) == _count(depth, width)
    assert network.inplanes == 2048 * width


def test_sizes_of_the_papers_table() -> None:
    """SSL-EY's table has the sizes of VICReg's: 23, 93 and 250 million parameters."""
    assert [_count(depth, width) // 10**6 for depth, width in ((50, 1), (50, 2), (200, 2))] == [23, 93, 250]


@pytest.mark.slow
def test_width_1_is_the_network_of_torchvision() -> None:
    ours, theirs = wide_resnet(50, 1, num_classes=3).eval(), resnet50(num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict())
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


def test_initial_weights_have_the_scale_of_torchvision() -> None:
    ours, theirs = wide_resnet(50, 1), resnet50()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if one.ndim > 1:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name
        elif not name.startswith("fc"):
            assert torch.equal(one, other), name


def test_blocks_can_start_as_the_identity() -> None:
    for switch in (False, True):
        network = wide_resnet(50, 1, zero_init_residual=switch)
        blocks = [part for part in network.modules() if isinstance(part, Bottleneck)]
        assert len(blocks) == 16
        assert all((block.bn3.weight == 0).all().item() is switch for block in blocks)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((18, 2), {}, "depth must be one of 50, 101, 152, 200, got 18"),
        ((50, 0), {}, "width must be in \\[1, inf\\), got 0"),
        ((50, 2), {"weights": "DEFAULT"}, "has no published weights, got weights='DEFAULT'"),
    ],
)
def test_invalid_arguments_raise_an_error(arguments: tuple[int, int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wide_resnet(*arguments, **options)


@pytest.mark.slow
def test_an_export_finds_the_network_of_the_weights() -> None:
    with torch.device("meta"):
        network = BACKBONES["resnet50x2"]()
    network.fc = nn.Identity()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}
    arch, _, model = fit(Backbone(state, {}, None), "torchvision", None)
    assert arch == "resnet50x2"
    assert model.conv1.weight.shape[0] == 128
