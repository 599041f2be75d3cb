"""Feature maps from inside a backbone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from plugins.taps import FeatureTaps, map_channels


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 2, stride=2), nn.Flatten())


def images(*sides: int, rows: int = 2) -> list[Tensor]:
    return [torch.randn(rows, 3, side, side) for side in sides]


def axes(views: list[Tensor]) -> list[tuple[int, ...]]:
    return [view.shape[:-3] for view in views]


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_the_maps_of_each_view_come_with_their_gradient():
    network, views = backbone(), images(8, 8, 8)
    with FeatureTaps(network, {"2": None, "0": 4}) as taps:
        results = [network(view) for view in views]
        maps = taps.take(axes(views))
    for view, result, (late, early) in zip(views, results, maps, strict=True):
        torch.testing.assert_close(late.flatten(1), result)
        torch.testing.assert_close(early, F.avg_pool2d(network[0](view), 2))
    maps[1][1].sum().backward()
    assert network[0].weight.grad is not None and network[2].weight.grad is None


@pytest.mark.parametrize("calls", [[5], [2, 3], [1, 1, 3], [1] * 5])
def test_views_that_the_backbone_gets_concatenated_are_separated(calls):
    network, views = backbone(), images(8, 8, 8, 8, 8)
    with FeatureTaps(network, {"0": 4}) as taps:
        for view in views:
            network(view)
        single = taps.take(axes(views))
        rest = [*views]
        for count in calls:
            network(torch.cat([rest.pop(0) for _ in range(count)]))
        for (one,), (other,) in zip(single, taps.take(axes(views)), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("together", [False, True])
def test_views_of_unequal_sides_have_maps_of_unequal_sides(together):
    """Multi-crop has two large views and three small ones here; the small maps are not enlarged."""
    network, views = nn.Sequential(*backbone()[:3]), images(16, 16, 6, 6, 6)
    with FeatureTaps(network, {"0": 8, "2": None}) as taps:
        for call in [torch.cat(views[:2]), torch.cat(views[2:])] if together else views:
            network(call)
        maps = taps.take(axes(views))
    assert [[one.shape[-1] for one in view] for view in maps] == [[8, 8]] * 2 + [[6, 3]] * 3
    for view, (early, late) in zip(views, maps, strict=True):
        torch.testing.assert_close(late, network(view))
        torch.testing.assert_close(early, F.adaptive_avg_pool2d(network[0](view), early.shape[-1]))


def test_a_side_is_reduced_and_never_enlarged():
    network = backbone()
    with FeatureTaps(network, {"0": 4}) as taps:
        network(torch.randn(2, 3, 8, 2))
        assert taps.take([(2,)])[0][0].shape == (2, 4, 4, 2)


def test_the_maps_of_a_stack_have_an_axis_of_patches():
    network, image, stack = backbone(), *images(8), torch.randn(2, 5, 3, 4, 4)
    with FeatureTaps(network, {"0": None}) as taps:
        network(image), network(stack.flatten(0, 1))
        (of_image,), (of_stack,) = taps.take(axes([image, stack]))
    assert of_image.shape == (2, 4, 8, 8) and of_stack.shape == (2, 5, 4, 4, 4)
    torch.testing.assert_close(of_stack[:, 3], network[0](stack[:, 3]))


@pytest.mark.parametrize("rows", [[2], [3, 1], [2, 2, 2], []])
def test_calls_that_are_not_the_views_are_an_error(rows):
    network = backbone()
    with FeatureTaps(network, {"0": None}) as taps:
        for count in rows:
            network(*images(8, rows=count))
        with pytest.raises(ValueError, match=r"maps of 0 have \[.*\] rows, which are not those of views of \[2, 2\]"):
            taps.take([(2,), (2,)])
        network(torch.cat(images(8, 8)))
        assert len(taps.take([(2,), (2,)])) == 2, "those of before are forgotten"


def test_nothing_is_kept_outside_of_the_block():
    network = backbone()
    taps = FeatureTaps(network, {"0": None})
    network(*images(8))
    with taps:
        pass
    with pytest.raises(KeyError), taps:
        network(*images(8))
        raise KeyError  # such as an error of the loss
    assert hooks(network) == 0 and not any(taps._kept.values())
    with torch.no_grad():
        network(*images(8))  # a pass over the training set
    with taps:
        network(*images(8, rows=3))
        assert [len(map_) for view in taps.take([(3,)]) for map_ in view] == [3]


def test_evaluation_has_maps_too():
    network = backbone().eval()
    with torch.no_grad(), FeatureTaps(network, {"0": None}) as taps:
        network(*images(8))
        assert not taps.take([(2,)])[0][0].requires_grad


def test_copies_and_pickles_keep_nothing():
    network = backbone()
    with FeatureTaps(network, {"0": None}) as taps:
        network(*images(8))
        taps.take([(2,)])
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(network), torch.load(buffer, weights_only=False)):
        assert hooks(twin) == 0
        with FeatureTaps(twin, {"0": None}) as of_twin, FeatureTaps(network, {"0": None}) as taps:
            twin(*images(8))
            assert len(of_twin.take([(2,)])) == 1 and not any(taps._kept.values())


def test_a_module_that_is_replaced_is_found_by_its_name():
    """convert_sync_batchnorm replaces batch norm after the model has been built."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    taps = FeatureTaps(network, {"1": None})
    network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.eval()  # on a CPU
    (view,) = images(8)
    with taps:
        result = network(view)
        assert torch.equal(taps.take([(2,)])[0][0].flatten(1), result)


def test_a_name_may_be_the_last_part_of_one():
    inner = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "block": nn.ModuleDict({"conv": nn.Conv2d(3, 5, 1)})})
    network = nn.ModuleDict({"blocks": inner})
    assert FeatureTaps(network, {"conv": 1})._found() == [inner["conv"]]
    assert FeatureTaps(network, {"block.conv": 1})._found() == [inner["block"]["conv"]]
    with pytest.raises(ValueError, match=r"several submodules 'conv': 0.conv, 1.conv; give a whole name"):
        FeatureTaps(nn.Sequential(*(nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1)}) for _ in range(2))), {"conv": 1})


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


def test_an_output_that_is_no_map_is_an_error():
    network = backbone()
    with FeatureTaps(network, {"3": 2}), pytest.raises(ValueError, match=r"output of 3 is not a map .* \(2, 96\)"):
        network(*images(8))


def test_a_map_that_a_later_module_changes_in_place_is_an_error():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))
    with FeatureTaps(network, {"0": None, "1": None}) as taps:
        network(*images(8))
        with pytest.raises(ValueError, match="map of 0 has been changed in place; tap the module that changes it"):
            taps.take([(2,)])
        with FeatureTaps(network, {"1": None}) as later:
            network(*images(8))
            assert len(later.take([(2,)])) == 1


def test_the_channels_are_counted_without_a_trace():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)).double()
    network[1].eval()
    state = copy.deepcopy(network.state_dict())
    assert map_channels(network, {"2": 1, "0": None}, [8]) == [6, 4] and map_channels(network, {}, [8]) == []
    assert network.training and not network[1].training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())
    with pytest.raises(ValueError, match="cannot process an image of 3 pixels"):
        map_channels(network, {"2": 1}, [3])


def test_a_backbone_of_one_size_is_asked_with_that_size():
    class Fixed(nn.Conv2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            assert input.shape[-1] == 32, "takes 32 pixels"
            return super().forward(input)

    assert map_channels(nn.Sequential(Fixed(3, 4, 3), nn.ReLU()), {"1": None}) == [4]
    with pytest.raises(ValueError, match=r"cannot process an image of 64, 224 pixels \(takes 32 pixels"):
        map_channels(nn.Sequential(Fixed(3, 4, 3), nn.ReLU()), {"1": None}, [64, 224])


class Checkpointed(nn.Module):
    """Blocks of which the first two are computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = backbone(), reentrant
        self.after = nn.Sequential(nn.Unflatten(1, (6, -1, 4)), nn.AvgPool2d(2))

    def forward(self, x):
        return self.after(checkpoint(self.inner, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("name", ["inner.0", "inner.1", "after.1"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_that_loses_the_gradient_is_an_error(name):
    network = Checkpointed(reentrant=True)
    with FeatureTaps(network, {name: None}) as taps:
        network(*images(8))
        with pytest.raises(ValueError, match=rf"{name} have no gradient; switch off the activation checkpointing"):
            taps.take([(2,)])
        network.requires_grad_(False)(*images(8))
        assert len(taps.take([(2,)])) == 1, "nothing is trained"


def test_a_stem_that_is_not_trained_may_be_tapped():
    network = backbone()
    network[0].requires_grad_(False)
    with FeatureTaps(network, {"1": None, "2": None}) as taps:
        network(*images(8))
        ((of_stem, late),) = taps.take([(2,)])
    assert late.requires_grad and not of_stem.requires_grad


@pytest.mark.parametrize("size", [None, 4])
def test_checkpointing_that_keeps_the_gradient_gives_the_same_gradients(size):
    """The forward pass within the backward pass is not kept, and has the operations of the first one."""
    network, (x,) = Checkpointed(reentrant=False), images(8)
    with FeatureTaps(network, {"inner.0": size}) as taps:
        result = network(x)
        ((early,),) = taps.take([(2,)])
    (result.sum() + early.square().sum()).backward()
    twin = Checkpointed(reentrant=False)
    early = twin.inner[0](x)
    (twin.after(twin.inner(x)).sum() + (early if size is None else F.avg_pool2d(early, 2)).square().sum()).backward()
    torch.testing.assert_close(network.inner[0].weight.grad, twin.inner[0].weight.grad)


def test_wrappers_are_refused():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inner = backbone()
    inner.compile(backend="eager")
    for wrapped, how in [
        (checkpoint_wrapper(backbone()), "activation checkpointing"),
        (torch.compile(backbone(), backend="eager"), "torch.compile"),
        (inner, "torch.compile"),
    ]:
        network = nn.Sequential(backbone(), nn.Identity())
        taps = FeatureTaps(network, {"0": None})
        network[0] = wrapped  # later, as a Trainer does
        with pytest.raises(ValueError, match=f"^{how} of the backbone or of a part of it allows no feature maps"):
            taps.__enter__()
        assert hooks(network) == 0


class Model(nn.Module):
    """The loss of a backbone and of a map of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()

    def forward(self, views: list[Tensor], tapped: bool = True) -> Tensor:
        if not tapped:
            return sum(self.backbone(view).sum() for view in views)
        with FeatureTaps(self.backbone, {"0": 4}) as taps:
            features = [self.backbone(view) for view in views]
            maps = taps.take([view.shape[:-3] for view in views])
        return sum(h.sum() for h in features) + sum(map_.square().mean() for (map_,) in maps)


def test_a_model_may_be_compiled_as_a_whole():
    """This includes a model that was first compiled for a pass without maps."""
    plain, model = Model(), Model()
    compiled = torch.compile(model, backend="aot_eager")
    for tapped in (False, True, True, False, True):
        views = images(8, 8)
        with torch.no_grad():
            compiled(views, tapped)
        ours, theirs = compiled(views, tapped), plain(views, tapped)
        torch.testing.assert_close(ours, theirs)
        ours.backward()
        theirs.backward()
    torch.testing.assert_close(model.backbone[0].weight.grad, plain.backbone[0].weight.grad)


def test_half_precision_and_memory_formats_change_nothing():
    plain, model, views = Model(), Model().to(memory_format=torch.channels_last), images(8, 8)
    given = [view.to(memory_format=torch.channels_last) for view in views]
    torch.testing.assert_close(model(given), plain(views))
    with torch.autocast("cpu", torch.bfloat16), FeatureTaps(model.backbone, {"0": 4}) as taps:
        model.backbone(given[0])
        assert taps.take([(2,)])[0][0].dtype == torch.bfloat16


def _gradients(comm, views):
    model = DistributedDataParallel(Model())
    model(views).backward()
    return model.module.backbone[0].weight.grad


@pytest.mark.ddp
def test_the_hooks_are_on_the_module_within_ddp(ranks):
    views = [images(8, 8, rows=rows) for rows in (2, 2, 3)]
    expected = []
    for given in views:
        model = Model()
        model(given).backward()
        expected.append(model.backbone[0].weight.grad)
    for found in ranks.run(_gradients, [(given,) for given in views]):
        torch.testing.assert_close(found, sum(expected) / 3)
