"""Feature maps from inside a backbone."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from plugins.taps import FeatureTaps


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2), nn.Flatten())


def test_the_maps_of_each_view_come_with_their_gradient():
    network, views = backbone(), [torch.randn(2, 3, 8, 8) for _ in range(3)]
    taps = FeatureTaps(network, {"2": None, "0": 4})
    results = [network(view) for view in views]
    maps = taps.take(3)
    for view, result, (late, early) in zip(views, results, maps, strict=True):
        torch.testing.assert_close(late.flatten(1), result)
        torch.testing.assert_close(early, nn.functional.avg_pool2d(network[0](view), 2))
    taps.clear()
    maps[1][1].sum().backward()
    assert network[0].weight.grad is not None and network[2].weight.grad is None


def test_views_that_the_backbone_gets_concatenated_are_separated():
    network, views = backbone(), [torch.randn(2, 3, 8, 8) for _ in range(2)]
    taps = FeatureTaps(network, {"0": None})
    network(torch.cat(views))
    together = taps.take(2)
    for view in views:
        network(view)
    for (one,), (other,) in zip(together, taps.take(2), strict=True):
        torch.testing.assert_close(one, other)


def test_the_maps_are_forgotten():
    network = backbone()
    taps = FeatureTaps(network, {"0": None})
    network(torch.randn(2, 3, 8, 8))
    taps.take(1)
    with pytest.raises(ValueError, match="maps of 0 have 0 rows, which are not 1 views"):
        taps.take(1)
    network(torch.randn(3, 3, 8, 8))
    with pytest.raises(ValueError, match="3 rows, which are not 2 views"):
        taps.take(2)
    network.eval()(torch.randn(2, 3, 8, 8))
    assert not taps._taps[0].kept, "evaluation keeps nothing"
    taps.remove()
    network.train()(torch.randn(2, 3, 8, 8))
    assert not taps._taps[0].kept


def test_copies_keep_nothing():
    network = backbone()
    taps = FeatureTaps(network, {"0": None})
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(network), torch.load(buffer, weights_only=False)):
        twin(torch.randn(2, 3, 8, 8))
        assert not taps._taps[0].kept
        of_twin = FeatureTaps(twin, {"0": None})
        twin(torch.randn(2, 3, 8, 8))
        assert len(of_twin.take(1)) == 1 and not taps._taps[0].kept


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"layer9": 7}, "no submodule 'layer9'; its children are 0, 1, 2, 3"),
        ({"": 7}, "no submodule ''"),
        ({"0": 0}, "size of 0 must be an integer > 0 or None, got 0"),
    ],
)
def test_what_cannot_be_tapped_is_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        FeatureTaps(backbone(), sizes)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = backbone(), reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def test_checkpointing_that_loses_the_gradient_is_an_error():
    network = Checkpointed(reentrant=True)
    taps = FeatureTaps(network, {"inner.0": None})
    network(torch.randn(2, 3, 8, 8, requires_grad=True))
    with pytest.raises(ValueError, match=r"inner.0 have no gradient; switch off the activation checkpointing"):
        taps.take(1)


def test_a_forward_pass_within_the_backward_pass_is_not_kept():
    network, x = Checkpointed(reentrant=False), torch.randn(2, 3, 8, 8)
    taps = FeatureTaps(network, {"inner.0": None})
    result = network(x)
    ((early,),) = taps.take(1)
    (result.sum() + early.square().sum()).backward()
    assert not taps._taps[0].kept
    twin = backbone()
    (twin(x).sum() + twin[0](x).square().sum()).backward()
    torch.testing.assert_close(network.inner[0].weight.grad, twin[0].weight.grad)


def test_wrappers_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    with pytest.raises(ValueError, match="wrapped in CheckpointWrapper, which allows no feature maps"):
        FeatureTaps(nn.Sequential(checkpoint_wrapper(backbone())), {"0": None})


def test_a_pass_without_gradient_may_be_tapped():
    network = backbone()
    taps = FeatureTaps(network, {"0": None})
    with torch.no_grad():
        network(torch.randn(2, 3, 8, 8))
        assert not taps.take(1)[0][0].requires_grad
