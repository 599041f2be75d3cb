"""Losses, heads and transforms with lightly's interfaces, and their examples."""

import doctest
import importlib
import inspect
import pickle
import pkgutil

import pytest
import torch
import torchvision
from lightly.transforms.vicreg_transform import VICRegTransform
from PIL import Image
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import InterpolationMode

import lightly_ext
from lightly_ext import collective, loss, models, transforms
from lightly_ext.models.modules import heads
from lightly_ext.names import CLASS_NAMES
from plugins import losses as plugin_losses
from plugins.distributed import LOCAL, WORLD
from plugins.methods import METHODS
from plugins.testing import assert_joined, toy_views

pytestmark = pytest.mark.lightly

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lightly_ext.__path__, "lightly_ext.")
    if not module.name.endswith((".auto", ".__main__")) and ".examples" not in module.name
)


@pytest.mark.sample("lightly_ext.[!m]*", "lightly_ext.models.*")
@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ResNet-18 of the models' examples has half of its blocks here."""
    monkeypatch.setattr(torchvision.models, "resnet18", lambda: ResNet(BasicBlock, [1, 1, 1, 1]))
    module = importlib.import_module(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    wanted = {"lightly_ext.loss.ssley_loss": 6, "lightly_ext.models": 8 * len(METHODS)}
    assert results.attempted >= wanted.get(name, 0)


def test_every_loss_of_plugins_is_here() -> None:
    ours = {name for name in plugin_losses.__all__ if name.endswith("Loss")}
    assert set(loss.__all__) == ours >= {"BYOLLoss", "IsoLoss", "SSLEYLoss"}


@pytest.mark.parametrize("name", loss.__all__)
def test_losses_speak_lightlys_dialect(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = vars(loss)[name]
    assert cls.__doc__.startswith("Implementation of ") and "Attributes:" in cls.__doc__
    required = [
        parameter
        for parameter in list(inspect.signature(vars(plugin_losses)[name]).parameters.values())
        if parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    values = {parameter.name: 1 for parameter in required}
    assert cls(**values).comm is LOCAL and cls(**values).gather_distributed is False
    assert cls(**values, gather_distributed=True).comm is WORLD
    pickle.loads(pickle.dumps(cls(**values)))
    monkeypatch.setattr(collective.dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gather_distributed is True but this torch was built without"):
        cls(**values, gather_distributed=True)


def test_a_loss_without_a_file_of_its_own_is_translated() -> None:
    translated = loss._in_lightlys_dialect(plugin_losses.SSLEYLoss)
    first, second = toy_views(6, 3)
    assert translated(estimator="ustat", gather_distributed=True).comm is WORLD
    expected = plugin_losses.ssl_ey_loss(first, second, estimator="ustat")
    torch.testing.assert_close(translated(estimator="ustat")(first, second), expected)


def test_losses_are_those_of_plugins() -> None:
    first, second = toy_views(6, 3)
    third = first @ torch.diag(torch.tensor([1.0, 0.5, 0.1], dtype=first.dtype))
    pairs = [
        (loss.SSLEYLoss()(first, second), plugin_losses.ssl_ey_loss(first, second)),
        (loss.SSLEYLoss()(z_a=first, z_b=second), plugin_losses.ssl_ey_loss(first, second)),
        (loss.SSLEYLoss(estimator="split")(first, second), plugin_losses.ssl_ey_loss(first, second, estimator="split")),
        (loss.BYOLLoss("euclidean")(first, second), plugin_losses.byol_loss(first, second, metric="euclidean")),
        (loss.IsoLoss()(first, third, second), plugin_losses.isoloss(first, third, second)),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "options"), [("MatrixSSLLoss", {}), ("MECLoss", {"eps_d": 0.5})])
def test_former_keywords_of_the_matrix_losses_warn(name: str, options: dict) -> None:
    """The former p was the teacher's target, which gets no gradient."""
    first, second = (view.requires_grad_() for view in toy_views(6, 3))
    criterion = vars(loss)[name](**options)
    expected = criterion(p0=first, p1=second, target0=second, target1=first)
    with pytest.warns(FutureWarning, match="now called p0, p1"):
        assert torch.equal(criterion(z0=first, z1=second, p0=second, p1=first), expected)


def test_byol_loss_is_lightlys_negative_cosine() -> None:
    from lightly.loss import NegativeCosineSimilarity

    first, second = toy_views(6, 3)
    torch.testing.assert_close(loss.BYOLLoss()(first, second), 2 + 2 * NegativeCosineSimilarity()(first, second))


def _gathered(comm, model, x0, x1):
    from lightly_ext.loss import SSLEYLoss

    return SSLEYLoss(gather_distributed=True)(model(x0), model(x1))


def _alone(comm, model, x0, x1):
    from lightly_ext.loss import SSLEYLoss

    return SSLEYLoss()(model(x0), model(x1))


@pytest.mark.ddp
def test_gathering_gives_the_gradients_of_the_joined_batch(ranks) -> None:
    assert_joined(ranks, _gathered, toy_views(12, 5), counts=(3, 4, 5))
    with pytest.raises(AssertionError):
        assert_joined(ranks, _alone, toy_views(12, 5), counts=(3, 4, 5))


# ----------------------------------------------------------------------------------------------------------- heads


def test_every_method_has_a_projection_head() -> None:
    for name, spec in CLASS_NAMES.items():
        ours = vars(heads).get(f"{name}ProjectionHead")
        if "proj_hidden_dim" in spec.options and not ours.__module__.startswith("lightly."):
            head = ours(16, 12, 8)
            assert isinstance(head, heads.ProjectionHead)
            assert head(torch.randn(4, 16)).shape == (4, 8)
    with pytest.raises(ValueError, match="method isoloss has no option 'hidden'"):
        heads.IsoLossProjectionHead(16, hidden=3)


def test_heads_that_lightly_has_are_lightlys() -> None:
    from lightly.models.modules import heads as theirs

    for name in ("BYOLProjectionHead", "BYOLPredictionHead", "SimSiamProjectionHead", "SimSiamPredictionHead"):
        assert vars(heads)[name] is vars(theirs)[name]


def test_layers_of_ssl_eys_head() -> None:
    kinds = [type(layer).__name__ for layer in heads.SSLEYProjectionHead(16, 12, 8, num_layers=3).layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "ScaledLinear"]
    with torch.device("meta"):  # 100 million weights, which nobody looks at
        head = heads.SSLEYProjectionHead()
    assert [tuple(p.shape) for p in head.parameters() if p.ndim == 2] == [(8192, 2048), (8192, 8192)]
    with pytest.raises(ValueError, match="num_layers must be at least 2, got 1"):
        heads.SSLEYProjectionHead(num_layers=1)


@pytest.mark.parametrize("name", ["DirectPred", "DirectCopy", "IsoLoss", "IsoCopy"])
def test_computed_prediction_heads_are_the_method(name: str) -> None:
    """Called view after view, they predict what the method's predictor does, with its defaults."""
    head = vars(heads)[f"{name}PredictionHead"](6)
    spec = CLASS_NAMES[name]
    predictor = spec.predictor({**spec.resolve({}), "proj_output_dim": 6}, LOCAL)
    for seed in range(3):
        views = toy_views(8, 6, seed=seed, dtype=torch.float32)
        for ours, theirs in zip([head(view) for view in views], predictor.predict(views), strict=True):
            assert torch.equal(ours, theirs)
    assert {"C", "W", "steps"} <= set(head.state_dict())
    assert not list(head.parameters())
    head.eval()
    before = head.W.clone()
    head(toy_views(8, 6, seed=9, dtype=torch.float32)[0])
    assert torch.equal(head.W, before)


def test_a_computed_prediction_head_fits_a_model() -> None:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.LazyLinear(6))
    backbone(torch.zeros(1, 3, 8, 8))
    views = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    own, theirs = (
        models.IsoLoss(backbone, input_dim=6, projection_head=nn.Linear(6, 4), prediction_head=head)
        for head in (heads.IsoLossPredictionHead(4), None)
    )
    theirs.load_state_dict(own.state_dict())
    assert torch.equal(own.loss(views), theirs.loss(views))


# ------------------------------------------------------------------------------------------------------ transforms


@pytest.mark.parametrize("name", [name for name, spec in CLASS_NAMES.items() if not spec.stacks])
def test_every_method_of_views_has_a_transform(name: str) -> None:
    transform = pickle.loads(pickle.dumps(vars(transforms)[f"{name}Transform"]()))
    views = transform(Image.new("RGB", (40, 30), (200, 10, 60)))
    side = {"AMDIM": 128}.get(name, 224)  # its published size on ImageNet
    assert [view.shape for view in views] == [(3, side, side)] * (CLASS_NAMES[name].views or 2)


def test_transforms_that_lightly_has_are_lightlys() -> None:
    import lightly.transforms as theirs

    assert transforms.BYOLTransform is theirs.BYOLTransform
    assert transforms.SimSiamTransform is theirs.SimSiamTransform


@pytest.mark.parametrize(
    ("name", "smallest", "jitter", "blurs", "solarizations"),
    [
        ("IsoLoss", 0.08, (0.4, 0.4, 0.2, 0.1), [1.0, 0.1], [0.0, 0.2]),
        ("MatrixSSL", 0.2, (0.4, 0.4, 0.2, 0.1), [1.0, 0.1], [0.0, 0.2]),
        ("MEC", 0.2, (0.4, 0.4, 0.2, 0.1), [1.0, 0.1], [0.0, 0.2]),
        ("DISSL", 0.08, (0.8, 0.8, 0.8, 0.2), [0.5, 0.5], [0.0, 0.0]),
        ("CISSL", 0.08, (0.8, 0.8, 0.8, 0.2), [0.5, 0.5], [0.0, 0.0]),
    ],
)
def test_views_are_the_published_ones(
    name: str, smallest: float, jitter: tuple[float, ...], blurs: list[float], solarizations: list[float]
) -> None:
    transform = getattr(transforms, f"{name}Transform")
    for given, expected in (({}, smallest), ({"min_scale": 0.5}, 0.5)):
        views = [view.transform.transforms for view in transform(**given).transforms]
        assert [view[0].scale for view in views] == [(expected, 1.0)] * 2
        for view in views:
            (applied,) = [step for step in view if type(step).__name__ == "RandomApply"]
            (colours,) = applied.transforms
            ranges = (colours.brightness, colours.contrast, colours.saturation, colours.hue)
            assert [high - (i < 3) for i, (_, high) in enumerate(ranges)] == pytest.approx(jitter)
        assert [view[6].prob for view in views] == blurs
        assert [view[7].prob for view in views] == solarizations


def test_knobs_reach_the_views() -> None:
    """With all probabilities 0 a view is the image itself; a pair of probabilities applies to the two views."""
    still = {"cj_prob": 0.0, "min_scale": 1.0, "random_gray_scale": 0.0, "hf_prob": 0.0, "normalize": None}
    image = Image.effect_noise((32, 32), 60).convert("RGB")
    transform = transforms.IsoLossTransform(32, **still, gaussian_blur=0.0, solarization_prob=(0.0, 1.0))
    torch.manual_seed(0)
    for _ in range(20):  # a crop of another shape is possible, if rare
        first, second = transform(image)
        expected = torch.tensor(list(image.getdata()), dtype=torch.float32).view(32, 32, 3).permute(2, 0, 1) / 255
        if torch.equal(first, expected):
            break
    torch.testing.assert_close(first, expected)
    assert not torch.equal(second, expected)
    assert transforms.IsoLossTransform(solarization_prob=0.3).transforms[0].transform.transforms[7].prob == 0.3


def test_views_of_ssl_ey_are_lightlys_vicreg_or_those_of_the_original_scripts() -> None:
    ours, theirs = transforms.SSLEYTransform(), VICRegTransform()
    for mine, other in zip(ours.transforms, theirs.transforms, strict=True):
        pairs = zip(mine.transform.transforms, other.transform.transforms, strict=True)
        for one, two in pairs:
            seen = [
                {name: value for name, value in vars(step).items() if name[0] != "_" and name != "interpolation"}
                for step in (one, two)
            ]
            assert type(one) is type(two) and str(seen[0]) == str(seen[1])
        first, second = (view.transform.transforms[0].interpolation for view in (mine, other))
        assert InterpolationMode(first) is InterpolationMode(second) is InterpolationMode.BILINEAR
    other = transforms.SSLEYTransform(gaussian_blur=(1.0, 0.1), solarize_prob=(0.0, 0.2), interpolation="bicubic")
    views = [view.transform.transforms for view in other.transforms]
    assert [(view[6].prob, view[7].prob) for view in views] == [(0.0, 1.0), (0.2, 0.1)]
    assert [view[0].interpolation.value for view in views] == ["bicubic", "bicubic"]
    with pytest.raises(ValueError, match="interpolation must be one of bilinear, bicubic, got 'cubic'"):
        transforms.SSLEYTransform(interpolation="cubic")
