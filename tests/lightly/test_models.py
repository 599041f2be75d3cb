"""Model classes compute what ``plugins`` computes, on any backbone, in any wrapper."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightly_ext import models
from lightly_ext.names import CLASS_NAMES
from plugins.distributed import LOCAL
from plugins.heads import Heads, SharedHead, TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import Objective, encode, encode_views, project
from plugins.spec import Embeddings
from plugins.targets import EMATeacher
from plugins.testing import (
    NARROW,
    OF_FEATURES,
    OF_IMAGES,
    assert_joined,
    toy_backbone,
    toy_mlp,
    toy_stacks,
    toy_views,
    view_count,
)

pytestmark = pytest.mark.lightly

SMALL = {**NARROW, "proj_hidden_dim": 12, "proj_output_dim": 8, "pred_hidden_dim": 10, "n_classes": 16}
NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}
ROWS = 6


def has_two_branches(method: str) -> bool:
    spec = METHODS[method]
    with torch.device("meta"):
        return isinstance(spec.head(6, spec.resolve({})), TwoBranchHead)


def small(method: str, **more: object) -> dict:
    """Options that make a method's heads small."""
    return {**{key: value for key, value in SMALL.items() if key in METHODS[method].options}, **more}


def built(method: str, backbone: nn.Module | None = None, **options: object) -> models.MethodModel:
    """A small model, the same at each call, with weights that no initialisation makes: its teacher differs."""
    torch.manual_seed(0)
    size = ROWS if METHODS[method].indexed else None
    model = vars(models)[NAMES[method]](backbone or toy_backbone(), num_samples=size, **small(method, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.start_epoch(0)
    return model


def images(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, 16, 16, generator=generator, dtype=dtype) for _ in range(2)]


def inputs(method: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor | None]:
    """The views of a method, and the positions of the images if it reads them."""
    spec = METHODS[method]
    stacks = toy_stacks(spec, spec.resolve(small(method)), ROWS, 3, 8, 8, dtype=dtype)
    return images(dtype)[: view_count(spec)] + stacks, torch.arange(ROWS) if spec.indexed else None


def plugins_loss(method: str, model: models.MethodModel, views: list[Tensor], index: Tensor | None) -> Tensor:
    """The same from the SPEC alone."""
    spec = METHODS[method]
    options = spec.resolve(small(method))
    features, maps = encode_views(model.backbone, views, spec.taps(options))
    z = project(model.projection_head, features)
    local = [model.projection_head.project_maps(view) for view in maps if view]
    p = z if spec.predictor is None else model.prediction_head.predict(z)
    if spec.teacher:
        with torch.no_grad():
            target = [model.teacher_projection_head(model.teacher_backbone(view).flatten(1)) for view in views]
    elif isinstance(model.projection_head, TwoBranchHead):
        target = [model.projection_head.teacher(h) for h in features]
    else:
        target = [view.detach() for view in z]
    if index is None:
        return spec.loss(options, LOCAL)(Embeddings(z, p, target, maps=local)).loss
    objective = Objective(spec, options).to(z[0])
    objective.allocate(ROWS)
    return objective(Embeddings(z, p, target, index=index, maps=local)).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", OF_IMAGES)
def test_loss_and_gradients_are_those_of_plugins(method: str, dtype: torch.dtype) -> None:
    model = built(method).to(dtype)
    alone = copy.deepcopy(model)
    model.loss(*inputs(method, dtype)).backward()
    loss = copy.deepcopy(alone)(*inputs(method, dtype))  # a list of views: forward is the loss
    expected = plugins_loss(method, alone, *inputs(method, dtype))
    expected.backward()
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(loss, expected, **tolerance)
    for (name, ours), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert (ours.grad is None) == (not ours.requires_grad)
        assert ours.requires_grad or name.startswith("teacher_") or name == "projection_head.6.bias"
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    for (name, ours), theirs in zip(model.named_buffers(), alone.buffers(), strict=True):
        if not name.startswith("objective."):  # what the loss counts
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("method", ["dissl", "cissl"])
def test_small_crops_are_students_alone(method: str) -> None:
    model = built(method).double()
    large = images(torch.float64)
    crops = [view[:, :, 4:12, 4:12] for view in (*large, large[0].flip(3))]
    alone = copy.deepcopy(model)
    features = [alone.backbone(view).flatten(1) for view in (*large, *crops)]
    z = [alone.projection_head(h) for h in features]
    target = [alone.projection_head.teacher(h) for h in features[:2]]
    expected = METHODS[method].loss(alone.options, LOCAL)(Embeddings(z, z, target)).loss
    torch.testing.assert_close(model.loss([*large, *crops]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dissl", "cissl"])
def test_small_crops_before_large_views_are_refused(method: str) -> None:
    """Without the error they would be used as large views: the loss would be another one, without a warning."""
    model, large = built(method), images()
    small = [view[:, :, 4:12, 4:12] for view in large]
    for views in ([*small, *large], [large[0], *small, large[1]]):
        with pytest.raises(ValueError, match=r"put the largest first, got views of sizes \[\((8|16), (8|16)\), "):
            model.loss(views)


def test_classes_are_named_after_titles() -> None:
    wanted = {"BYOL", "CISSL", "DISSL", "DirectCopy", "DirectPred", "IsoCopy", "IsoLoss", "MatrixSSL", "MEC", "SSLEY"}
    assert wanted <= set(models.__all__)
    assert {vars(models)[name].spec.name for name in CLASS_NAMES} == set(METHODS)


def test_features_projections_and_widths() -> None:
    model = built("isoloss").eval()
    x = images()[0]
    features = model(x)
    assert features.shape == (6, 8) and model.feature_dim == 8
    torch.testing.assert_close(features, model.backbone(x).flatten(1))
    torch.testing.assert_close(model.project(x), model.projection_head(features))


@pytest.mark.parametrize("method", METHODS)
def test_training_parameters_are_all_but_the_teacher(method: str) -> None:
    model = built(method)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)] for parameter in model.training_parameters()}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("backbone") for name in trained) and not any("teacher_" in name for name in trained)
    assert len(model.training_parameters()) == len(trained)


def test_learning_rate_of_the_predictor() -> None:
    model = built("byol", pred_lr_scale=10.0)
    rates = {group["name"]: group["lr"] for group in model.training_parameters(lr=0.5)}
    assert rates == {"backbone": 0.5, "projection_head": 0.5, "prediction_head": 5.0}
    with pytest.raises(ValueError, match=r"rate of prediction_head by 10 .*training_parameters\(lr=...\)"):
        model.training_parameters()
    groups = built("isoloss").training_parameters(lr=0.5)
    assert [group["name"] for group in groups] == ["backbone", "projection_head"], "a computed predictor trains nothing"


def test_teacher_moves_as_that_of_plugins() -> None:
    model = built("directpred")
    student = nn.ModuleList([model.backbone, model.projection_head])
    copied = nn.ModuleList([model.teacher_backbone, model.teacher_projection_head])
    before = [parameter.clone() for parameter in copied.parameters()]
    teacher = EMATeacher(student, copy.deepcopy(copied), base=0.75, final=1.0)
    with torch.no_grad():
        for theirs, old in zip(teacher.module.parameters(), before, strict=True):
            theirs.copy_(old)
    assert teacher.update(0, 10) == 0.75
    model.update_momentum(0.75)
    for ours, theirs, old, now in zip(
        copied.parameters(), teacher.module.parameters(), before, student.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, 0.75 * old + 0.25 * now)
    with pytest.raises(ValueError, match=r"m must be in \[0, 1\], got 1.5"):
        model.update_momentum(1.5)
    built("ssl_ey").update_momentum(0.5)  # one loop for all methods


def test_without_a_teacher_targets_are_the_other_view() -> None:
    model = built("byol", teacher=False)
    assert model.teacher_backbone is None and not any(name.startswith("teacher") for name in model.state_dict())
    alone = copy.deepcopy(model)
    z = [alone.project(view) for view in images()]
    embeddings = Embeddings(z, alone.prediction_head.predict(z), [view.detach() for view in z])
    expected = METHODS["byol"].loss(alone.options, LOCAL)(embeddings).loss
    torch.testing.assert_close(model.loss(images()), expected, rtol=1e-6, atol=1e-7)


def test_the_views_of_a_shared_head_have_common_batch_statistics_in_the_teacher_too() -> None:
    head = SharedHead(nn.Linear(8, 4), nn.BatchNorm1d(4))
    model = models.BYOL(toy_backbone(), projection_head=head, pred_hidden_dim=4)
    views = [1 + 2 * view for view in images()]
    views[1] = 3 * views[1]
    expected = copy.deepcopy(model.teacher_projection_head).views(
        [encode(model.teacher_backbone, view) for view in views]
    )
    torch.testing.assert_close(model.embed(views)[1].target, expected)


def test_heads_of_lightly() -> None:
    """BYOL with lightly's heads has the loss of lightly's example."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import heads

    torch.manual_seed(0)
    head, predictor = heads.BYOLProjectionHead(8, 12, 4), heads.BYOLPredictionHead(4, 6, 4)
    model = models.BYOL(toy_backbone(), projection_head=head, prediction_head=predictor)
    assert model.projection_head is head and model.options["proj_output_dim"] == 4
    theirs = copy.deepcopy(model)
    loss = model.loss(images())
    loss.backward()
    criterion = NegativeCosineSimilarity()
    p = [theirs.prediction_head(theirs.projection_head(theirs.backbone(x).flatten(1))) for x in images()]
    with torch.no_grad():
        z = [theirs.teacher_projection_head(theirs.teacher_backbone(x).flatten(1)) for x in images()]
    expected = 2 * (criterion(p[0], z[1]) + criterion(p[1], z[0]))
    expected.backward()
    torch.testing.assert_close(loss, expected + 4, rtol=1e-6, atol=1e-6)
    for ours, other in zip(model.training_parameters(), theirs.training_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", OF_IMAGES)
def test_state_dict_holds_everything(method: str) -> None:
    """A model that loads a state dict continues like the model that wrote it."""
    first = built(method)
    optimizer = torch.optim.SGD(first.training_parameters(), lr=0.05)

    def step(model: models.MethodModel, optimizer: torch.optim.Optimizer) -> Tensor:
        loss = model(*inputs(method))
        loss.backward()
        model.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_momentum(0.9)
        return loss.detach()

    step(first, optimizer)
    state = copy.deepcopy(first.state_dict())
    if method in ("directpred", "directcopy", "isoloss", "isocopy"):
        assert {"prediction_head.C", "prediction_head.W"} <= set(state)
    second = vars(models)[NAMES[method]](toy_backbone(), **small(method))
    second.load_state_dict(state)
    second.start_epoch(0)
    other = torch.optim.SGD(second.training_parameters(), lr=0.05)
    for _ in range(2):
        assert torch.equal(step(first, optimizer), step(second, other))
    state = second.state_dict()
    for name, value in first.state_dict().items():  # a number that is not known yet is NaN
        torch.testing.assert_close(value, state[name], rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("method", OF_IMAGES)
def test_models_copy_and_pickle(method: str) -> None:
    model = built(method)
    expected = copy.deepcopy(model).loss(*inputs(method))
    assert torch.equal(pickle.loads(pickle.dumps(model)).loss(*inputs(method)), expected)


def test_evaluation_leaves_the_model_as_it_is() -> None:
    model = built("isoloss", log_eigvals=True).eval()
    state = copy.deepcopy(model.state_dict())
    model.loss(images())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_spectrum_can_be_followed() -> None:
    assert built("ssl_ey").moment is None
    model = built("ssl_ey", log_eigvals=True)
    before = copy.deepcopy(model)
    model.loss(images())
    first, second = (before.project(view).detach() for view in images())
    moment = 0.99 * 0.01 * first.T @ first / 6 + 0.01 * second.T @ second / 6
    torch.testing.assert_close(model.moment.C, moment, rtol=1e-4, atol=1e-7)
    computed = built("isoloss")
    assert computed.moment is computed.prediction_head


@pytest.mark.slow
def test_backbones_are_asked_for_their_width_and_left_alone() -> None:
    import timm
    import torchvision

    resnet = torchvision.models.resnet18()
    resnet.fc = nn.Identity()
    resnet.layer1.eval()
    before = copy.deepcopy(resnet.state_dict())
    assert models.SSLEY(resnet).feature_dim == 512
    assert resnet.training and not resnet.layer1.training
    assert all(torch.equal(value, before[name]) for name, value in resnet.state_dict().items())
    body = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])  # as in lightly's examples
    assert models.SSLEY(body).feature_dim == 512
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    assert models.SSLEY(vit)(torch.zeros(1, 3, 224, 224)).shape == (1, 192)
    vectors = nn.Linear(5, 3)
    assert models.SSLEY(vectors, input_dim=3).loss([torch.randn(4, 5), torch.randn(4, 5)]).ndim == 0


def test_mistakes_are_sentences() -> None:
    import timm
    import torchvision

    views = images()
    with torch.device("meta"):  # its weights do not matter
        vit = torchvision.models.vit_b_16()
    cases = [
        (
            lambda: models.SSLEY(toy_backbone(), alhpa=1.0),
            "method ssl_ey has no option 'alhpa'; known options: estimator",
        ),
        (lambda: models.IsoLoss(toy_backbone(), roh=1.0), "; did you mean rho?"),
        (lambda: models.SSLEY(toy_backbone(), prediction_head=nn.Identity()), "method ssl_ey has no prediction head"),
        (lambda: models.SSLEY(toy_backbone(), teacher=True), "method ssl_ey has no teacher"),
        (lambda: models.SSLEY(nn.Linear(5, 3)), "backbone cannot process an image of shape (1, 3, 224, 224)"),
        (lambda: models.SSLEY(torchvision.models.resnet18()), "remove it: backbone.fc = torch.nn.Identity()"),
        (lambda: models.SSLEY(vit), "remove it: backbone.heads = torch.nn.Identity()"),
        (lambda: models.SSLEY(timm.create_model("convnext_atto")), "backbone.head.fc = torch.nn.Identity()"),
        (
            lambda: models.BYOL(toy_backbone(), projection_head=nn.Linear(8, 4), proj_output_dim=5),
            "projection_head has 4 output columns, got proj_output_dim=5",
        ),
        (lambda: models.DISSL(toy_backbone(), projection_head=nn.Linear(8, 4)), "method dissl has two heads; pass"),
        (
            lambda: built("byol").loss(views[0]),
            "got a tensor of shape (6, 3, 16, 16); pass a list with one batch of images per view",
        ),
        (
            lambda: built("byol").loss(views[:1]),
            "byol needs at least two views, got 1",
        ),
        (
            lambda: models.PIRL(toy_backbone()).loss(views),
            "method pirl needs 1 stack of patches per image, got none; use lightly_ext.transforms.PIRLTransform",
        ),
    ]
    for call, sentence in cases:
        with pytest.raises(ValueError) as error:
            call()
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["isoloss", "ssl_ey"])
def test_compiled(method: str) -> None:
    model = built(method)
    compiled_model = copy.deepcopy(model)
    compiled = torch.compile(compiled_model, backend="aot_eager")
    for _ in range(2):
        losses = []
        for each, call in ((model, model), (compiled_model, compiled)):
            each.zero_grad()
            loss = call(images())
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(model.training_parameters(), compiled_model.training_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(model.buffers(), compiled_model.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def _joined_build(method: str) -> models.MethodModel:
    """A model of vectors instead of images, without batch norm, whose statistics differ between processes."""
    parts = {"projection_head": toy_mlp(6, 4), "input_dim": 6}
    if has_two_branches(method):
        heads = Heads(teacher=toy_mlp(6, 4), student=toy_mlp(6, 4))
        parts["projection_head"] = TwoBranchHead(heads, 6)
    if "pred_hidden_dim" in METHODS[method].options:
        parts["prediction_head"] = toy_mlp(4, 4)
    memory = {"queue_size", "queue_epoch", "freeze_last_layer"} & set(METHODS[method].options)
    parts |= {key: NARROW[key] for key in memory}
    torch.manual_seed(0)
    model = vars(models)[NAMES[method]](toy_mlp(5, 6), **parts).double()
    with torch.no_grad():
        for parameter in [] if model.teacher_backbone is None else model.teacher_backbone.parameters():
            parameter.mul_(0.9)
    model.start_epoch(0)
    return model


class _Build:
    """A model of a method; picklable, to be sent to the ranks."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self) -> models.MethodModel:
        return _joined_build(self.method)


def _ddp_step(comm, model, x0, x1):
    wrapped = DistributedDataParallel(model) if comm.size > 1 else model
    return wrapped([x0, x1])


def _trained(comm, method, views):
    model = _joined_build(method)
    wrapped = DistributedDataParallel(model) if comm.size > 1 else model
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(views).backward()
        optimizer.step()
        model.update_momentum(0.9)
    return model.state_dict()


@pytest.mark.ddp
@pytest.mark.parametrize("method", OF_FEATURES)
def test_ranks_have_the_gradients_of_the_joined_batch(ranks, method: str) -> None:
    assert_joined(ranks, _ddp_step, toy_views(12, 5), counts=(3, 4, 5), build=_Build(method))


@pytest.mark.ddp
@pytest.mark.parametrize("method", ["isoloss", "ssl_ey"])
def test_training_on_ranks_is_training_on_the_joined_batch(ranks, method: str) -> None:
    views = toy_views(12, 5)
    expected = _trained(LOCAL, method, views)
    parts = zip(*(view.split([3, 4, 5]) for view in views), strict=True)
    for state in ranks.run(_trained, [(method, list(part)) for part in parts]):
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("mec", {"eps": 0.0}, "method mec: eps must be in"),
        ("mec", {"eps": 1e-6}, "eps must be in .8e-06, inf"),
        ("mec", {"eps": -64.0, "warmup_iter": 80}, "method mec: eps must be in"),
        ("mec", {"warmup_iter": -1}, "warmup_iter must be in .0, inf"),
        ("matrix_ssl", {"mce_order": 0}, "mce_order must be in .1, inf"),
        ("matrix_ssl", {"mce_mu": 0.0, "logarithm": "exact"}, "mce_mu must be in .1e-06, inf"),
        ("dissl", {"tau_teacher": 0.0}, "tau_teacher must be in .1e-06, inf"),
        ("dissl", {"n_classes": 1}, "n_classes must be in .2, inf"),
        ("cissl", {"temperature": 0.0}, "temperature must be in .1e-06, inf"),
        ("isoloss", {"rho": 2.0}, r"rho must be in .0, 1\], got 2.0"),
        ("byol", {"pred_lr_scale": 0.0}, "pred_lr_scale must be in .1e-06, inf"),
    ],
)
def test_a_number_out_of_range_is_refused_when_the_model_is_made(method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(method, **options)
