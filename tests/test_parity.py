"""One number everywhere: the same weights and views give the same loss and gradients in every framework."""

import pickle
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from lightly_ext import models
from lightly_ext.names import CLASS_NAMES
from plugins.distributed import LOCAL
from plugins.heads import SharedHead, StackHead, TwoBranchHead
from plugins.methods import METHODS
from plugins.metrics import QualityMonitor
from plugins.objective import connect, encode_views
from plugins.spec import Embeddings
from plugins.testing import NARROW
from plugins.tools.resnet8 import resnet8
from solo_ext.config import parse_pretrain
from solo_ext.registry import method_class
from vissl_ext.registry import register

register()

from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict  # noqa: E402

from vissl_ext.hooks import EMATeacherHook  # noqa: E402
from vissl_ext.task import PluginTask  # noqa: E402

pytestmark = [pytest.mark.solo, pytest.mark.lightly, pytest.mark.vissl]
CONFIGS = Path(__file__).parents[1] / "configs" / "solo" / "digits"
SMALL = {
    **NARROW,
    **{"proj_hidden_dim": 24, "proj_output_dim": 12, "pred_hidden_dim": 20, "n_classes": 16, "log_eigvals": True},
    "log_quality": True,
}


class Case(NamedTuple):
    """A method, options of it that are not the default, and the sides of the views; those of 16 pixels are large."""

    method: str
    options: dict[str, Any]
    sides: tuple[int, ...] = (16, 16)
    patches: int = 0
    """Number of patches in a stack of each image; 0: there is no stack."""

    @property
    def large(self) -> int:
        return self.sides.count(16)


CASES = {name: Case(name, {}) for name in METHODS}
CASES["cissl, simclr"] = Case("cissl", {"heads": "simclr", "positives": "other"})
CASES["relicv2, own targets"] = Case(
    "relicv2", {"num_negatives": 3, "kl": "column", "stop": "none", "target": "self", "predictor": "none"}
)
CASES["moco, symmetric"] = Case("moco", {"symmetric": True}, (16, 16, 8))
CASES["relic, small crops"] = Case("relic", {"alpha_small": 0.5}, (16, 16, 8))
CASES["pirl"] = Case("pirl", {"patches": 4}, (16,), patches=4)
CASES["cpc"] = Case("cpc", {"grid": 4, "patch": 8, "stride": 4, "directions": 4}, (), patches=16)
CASES["cpc, per sample"] = Case(
    "cpc", {**CASES["cpc"].options, "norm": "per_sample", "context": "gated", "score": "bilinear"}, (), patches=16
)
CASES |= {name: Case(name, {}, (16,)) for name in ("deepcluster", "sela")}
CROPS = {
    name: case._replace(sides=(16, 16, 8, 8)) for name, case in CASES.items() if METHODS[case.method].views is None
}


IMAGES, INDEX = 20, torch.tensor([7, 0, 3, 19, 4, 11, 12, 2])
"""Size of the training set, and the positions of the images of the batch."""


class Parts(NamedTuple):
    """The modules of a method, which have different names in the frameworks."""

    backbone: nn.Module
    projector: nn.Module
    predictor: nn.Module | None
    teacher_backbone: nn.Module | None
    teacher_projector: nn.Module | None


Step = Callable[[list[Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""Views → loss with a gradient, and the quality of features and projections."""


def options_of(case: Case) -> dict[str, Any]:
    """Every option of a method, as the SPEC has it, but for small widths; a framework's files may have others."""
    options = METHODS[case.method].resolve(case.options)
    return {**options, **{key: value for key, value in SMALL.items() if key in options}}


def labelled(criterion: Any) -> None:
    """Give DeepCluster v2, which has no labels before a pass over the training set, labels and prototypes."""
    if hasattr(criterion, "prototypes"):
        shape, generator = criterion.prototypes.shape, torch.Generator().manual_seed(3)
        criterion.prototypes.copy_(nn.functional.normalize(torch.randn(shape, generator=generator), dim=2))
        criterion.table.labels.copy_(torch.arange(IMAGES) % shape[1])


def in_plugins(case: Case) -> tuple[Parts, Step]:
    """The SPEC alone, around ResNet-8."""
    spec = METHODS[case.method]
    options = options_of(case)

    def encoder() -> tuple[nn.Module, nn.Module]:
        backbone = resnet8()
        backbone.fc = nn.Identity()
        spec.prepare(options, backbone)
        head = spec.head(64, options)
        connect(head, backbone, spec.taps(options))
        return backbone, head

    predictor = spec.predictor(options, LOCAL) if spec.predictor else None
    parts = Parts(*encoder(), predictor, *(encoder() if spec.teacher else (None, None)))

    def step(views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        features, maps = encode_views(parts.backbone, views, spec.taps(options))
        local = [parts.projector.project_maps(view) for view in maps if view]
        if isinstance(parts.projector, SharedHead):
            z = list(parts.projector(torch.cat(features)).chunk(len(views)))
        else:
            z = [parts.projector(h) for h in features]
        p = z if predictor is None else predictor.predict(z)
        if isinstance(parts.projector, TwoBranchHead):
            target = [parts.projector.teacher(h) for h in features[: case.large]]
        else:
            target = [view.detach() for view in z[: case.large]]
        if spec.teacher:
            with torch.no_grad():
                target = [parts.teacher_projector(parts.teacher_backbone(view)) for view in views[: case.large]]
        loss = spec.loss(options, LOCAL)
        for part in loss.modules():
            if hasattr(part, "allocate"):
                part.allocate(IMAGES)
        labelled(loss)
        if isinstance(parts.projector, StackHead):
            local = [parts.projector.project_stack(h) if h.ndim == 3 else () for h in features]
        quality = QualityMonitor(True)
        large = case.large or None  # without large views, the stacks
        quality.update(features=[h.mean(1) if h.ndim == 3 else h for h in features[:large]], projections=z[:large])
        return loss(Embeddings(z, p, target, index=INDEX, maps=local)).loss, quality.values()

    return parts, step


@lru_cache(maxsize=1)  # a case runs in two dtypes
def solo_config(method: str, *options: str) -> bytes:
    """The pickled configuration of the digits in solo-learn."""
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        cfg = compose(method, [f"data.train_path={CONFIGS}", "data.val_path=null", *options])
    return pickle.dumps(parse_pretrain(cfg))


@lru_cache(maxsize=1)
def vissl_config(method: str, *options: str) -> bytes:
    """The pickled configuration of the digits in VISSL."""
    composed = compose_hydra_configuration([f"config=pretrain/{method}/digits", *options])
    return pickle.dumps(convert_to_attrdict(composed, dump_config=False)[1])


def in_solo(case: Case) -> tuple[Parts, Step]:
    """solo-learn's training step, of the generation that is loaded; its online classifier has a separate loss."""
    options = [f"++method_kwargs.{key}={value}" for key, value in options_of(case).items()]
    if len(case.sides) > case.large:
        crop = "{rrc:{enabled:true,crop_min_scale:0.1,crop_max_scale:1.0},crop_size:%d,num_crops:%d}"
        options.append(f"augmentations=[{crop % (16, case.large)},{crop % (8, len(case.sides) - case.large)}]")
    cfg = pickle.loads(solo_config(case.method, *options))
    model = method_class(cfg)(cfg)
    model.log_dict = model.log = lambda *what, **how: None
    losses: list[Tensor] = []
    model.objective.register_forward_hook(lambda objective, given, terms: losses.append(terms.loss))
    teacher = METHODS[case.method].teacher
    parts = Parts(
        model.backbone,
        model.projector,
        model.predictor,
        model.momentum_backbone if teacher else None,
        model.momentum_projector if teacher else None,
    )

    def step(views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        model.to(views[0].dtype)  # the classifiers, too
        model.objective.allocate(IMAGES)
        labelled(model.objective.criterion)
        model.training_step((INDEX, views, INDEX % 10), 0)
        return losses.pop(), model.objective.epoch_quality()

    return parts, step


def in_lightly(case: Case) -> tuple[Parts, Step]:
    """lightly's manner: a model class around a backbone."""
    backbone = resnet8()
    backbone.fc = nn.Identity()
    (title,) = (title for title, spec in CLASS_NAMES.items() if spec.name == case.method)
    options = options_of(case)
    head = METHODS[case.method].head(64, options)  # lightly's default for SSL-EY scales the last layer
    model = getattr(models, title)(backbone, projection_head=head, **options)
    parts = Parts(
        model.backbone,
        model.projection_head,
        model.prediction_head,
        model.teacher_backbone,
        model.teacher_projection_head,
    )
    model.allocate(IMAGES)
    labelled(model.objective.criterion)
    return parts, lambda views: (model.loss(views, INDEX), model.epoch_quality())


def in_vissl(case: Case) -> tuple[Parts, Step]:
    """VISSL's model, loss and hook, as its task builds them."""
    options = [f"++config.LOSS.{case.method}.{key}={value}" for key, value in options_of(case).items()]
    if small := len(case.sides) - case.large:
        crops = f"size_crops:[16,8],num_crops:[{case.large},{small}],crop_scales:[[0.1,1],[0.1,1]]"
        crops = f"{{name:ImgPilToMultiCrop,total_num_crops:{len(case.sides)},{crops}}}"
        options.append(f"config.DATA.TRAIN.TRANSFORMS=[{crops},{{name:ToTensor}}]")
    task = PluginTask.from_config(pickle.loads(vissl_config(case.method, *options)))
    task.base_model = task._build_model()
    task.base_loss = task._build_loss()
    (head,) = task.base_model.heads
    teacher = task.base_loss.teacher.module if METHODS[case.method].teacher else None
    parts = Parts(
        task.base_model.trunk._feature_blocks,
        head.projector,
        head.predictor,
        teacher and teacher.trunk._feature_blocks,
        teacher and teacher.heads[0].projector,
    )

    def step(views: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        task.base_loss.objective.allocate(IMAGES)
        labelled(task.base_loss.objective.criterion)
        batch = SimpleNamespace(sample={"input": views, "data_idx": [INDEX] * len(views)})
        task.base_loss.set_index(batch.sample)
        EMATeacherHook().on_forward(SimpleNamespace(base_loss=task.base_loss, last_batch=batch))
        (output,) = task.base_model(views)
        return task.base_loss(output, torch.zeros(1)), task.base_loss.objective.epoch_quality()

    return parts, step


def run(build: Callable[[Case], tuple[Parts, Step]], case: Case, dtype: torch.dtype, weights: Any) -> Any:
    """Loss, gradients and quality of one framework.

    Returns:
        The loss, the gradients by part and name, the weights before the step, which are those given if any are, and
        the quality of features and projections.
    """
    parts, step = build(case)
    torch.manual_seed(1)
    for module in parts:
        if module is not None:
            module.to(dtype).train()
    if weights is None:
        with torch.no_grad():  # a teacher that differs from the student, biases that are not 0
            for module in parts:
                for parameter in module.parameters() if module is not None else ():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        weights = [module and {key: value.clone() for key, value in module.state_dict().items()} for module in parts]
    else:
        for module, state in zip(parts, weights, strict=True):
            if module is not None:
                module.load_state_dict(state, strict=True)
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype) for _ in case.sides]
    views = [view[..., :side, :side] for view, side in zip(draws, case.sides, strict=True)]
    if case.patches:
        stack = torch.randn(8, case.patches, 3, 8, 8, generator=generator, dtype=torch.float64)
        views.append(stack.to(dtype))
    loss, quality = step(views)
    names = {
        (part, key): parameter
        for part, module in zip(Parts._fields, parts, strict=True)
        if module is not None and not part.startswith("teacher")
        for key, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return loss.detach(), dict(zip(names, gradients, strict=True)), weights, quality


@pytest.mark.sample("isoloss-float64", "cissl-float32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_framework_computes_the_same(name: str, dtype: torch.dtype) -> None:
    compare(CASES[name], dtype)


@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("name", sorted(CROPS))
def test_every_framework_computes_the_same_with_small_crops(name: str) -> None:
    compare(CROPS[name], torch.float64)


def compare(case: Case, dtype: torch.dtype) -> None:
    """Assert that loss, gradients and logged quality of a method are equal in all frameworks."""
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    loss, gradients, weights, quality = run(in_plugins, case, dtype, None)
    assert len(gradients) > 27 and loss.dtype == dtype
    for build in (in_solo, in_lightly, in_vissl):
        their_loss, their_gradients, _, their_quality = run(build, case, dtype, weights)
        assert abs(their_loss - loss) <= tolerance * abs(loss), build.__name__
        assert their_gradients.keys() == gradients.keys(), build.__name__
        for key, gradient in gradients.items():
            assert (gradient is None) == (their_gradients[key] is None), (build.__name__, key)
            if gradient is not None:
                error = (their_gradients[key] - gradient).norm()
                assert error <= tolerance * gradient.norm() + 1e-30, (build.__name__, key, error / gradient.norm())
        assert their_quality.keys() == quality.keys() and len(quality) >= 12, build.__name__
        for key, value in quality.items():
            theirs = their_quality[key]
            assert torch.allclose(theirs, value, rtol=0.1 * tolerance**0.5, equal_nan=True), (build.__name__, key)


@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("method", METHODS)
def test_the_digits_are_trained_with_the_same_settings(method: str) -> None:
    """solo-learn's file and VISSL's; lightly's arguments come from the former (see test_suites_lightly)."""
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        solo = compose(method)
    vissl = compose_hydra_configuration([f"config=pretrain/{method}/digits"]).config
    spec = METHODS[method]
    given = {key: value for key, value in vissl.LOSS[method].items() if key not in ("name", "base_tau", "final_tau")}
    assert spec.resolve(given) == spec.resolve(solo.method_kwargs)
    if spec.teacher:
        taus = {"base_tau": solo.momentum.base_tau, "final_tau": solo.momentum.final_tau}
        assert {key: vissl.LOSS[method].get(key, 1.0) for key in taus} == taus
    assert solo.optimizer.batch_size == vissl.DATA.TRAIN.BATCHSIZE_PER_REPLICA
    theirs, rate = vissl.OPTIMIZER, vissl.OPTIMIZER.param_schedulers.lr
    assert (theirs.name, theirs.num_epochs) == (solo.optimizer.name, solo.max_epochs)
    assert theirs.weight_decay == pytest.approx(float(solo.optimizer.weight_decay))
    assert (rate.auto_lr_scaling.base_value, rate.auto_lr_scaling.base_lr_batch_size) == (solo.optimizer.lr, 256)
    assert rate.warmup * solo.max_epochs == pytest.approx(solo.scheduler.warmup_epochs, abs=0.01)
