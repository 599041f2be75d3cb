"""The methods in VISSL compute the losses of ``plugins``, and invalid configurations raise errors."""

import copy
import csv
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vissl.models import build_model
from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

from plugins.distributed import LOCAL
from plugins.heads import TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import Objective, encode, project
from plugins.sobel import SobelConv2d
from plugins.spec import Embeddings
from plugins.taps import FeatureTaps
from plugins.testing import NARROW, OF_IMAGES, toy_stacks, view_count
from plugins.tools.command import UserError
from vissl_ext.hooks import EMATeacherHook
from vissl_ext.life_cycle import LifeCycleHook
from vissl_ext.methods import copy_model, method_options
from vissl_ext.registry import register
from vissl_ext.task import PluginTask, check_config

register()
pytestmark = pytest.mark.vissl

SMALL = {
    **NARROW,
    **{"proj_hidden_dim": 12, "proj_output_dim": 8, "pred_hidden_dim": 10, "n_classes": 16, "log_eigvals": True},
}


@cache
def composed(*words: str) -> bytes:
    """The pickled configuration of the launcher's words."""
    return pickle.dumps(compose_hydra_configuration(list(words)))


def configuration(method: str, *overrides: str) -> Any:
    """The digits configuration of a method, with a small head."""
    small = [f"++config.LOSS.{method}.{key}={value}" for key, value in SMALL.items() if key in METHODS[method].options]
    words = [f"config=pretrain/{method}/digits", *small, *overrides]
    return convert_to_attrdict(pickle.loads(composed(*words)), dump_config=False)[1]


def built(method: str, *overrides: str) -> Any:
    """Task, with model and loss as ``prepare`` builds them."""
    task = PluginTask.from_config(configuration(method, *overrides))
    torch.manual_seed(0)
    task.base_model = task._build_model()
    task.base_loss = task._build_loss()
    task.base_model.train()
    return task


def vissl_loss(task: Any, batch: Any) -> Tensor:
    """Return the loss of a batch as VISSL's training step computes it."""
    output = task.base_model(batch)
    assert len(output) == 1
    views, rows = (batch, len(batch[0])) if isinstance(batch, list) else (batch.chunk(2), len(batch) // 2)
    sample = {"input": batch, "data_idx": [torch.arange(rows).repeat(len(views))]}
    step = SimpleNamespace(base_loss=task.base_loss, last_batch=SimpleNamespace(sample=sample))
    task.base_loss.allocate(rows)
    for hook in (LifeCycleHook(), EMATeacherHook()):
        hook.on_forward(step)
    return task.base_loss(output[0], torch.zeros(1))


def views_of(method: str, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Random views of the digits configuration of a method, with its stacks of patches."""
    spec = METHODS[method]
    options = method_options(method, pickle.loads(composed(f"config=pretrain/{method}/digits")).config.LOSS[method])
    views = [torch.randn(rows, 3, 16, 16, dtype=dtype) for _ in range(view_count(spec))]
    return views + toy_stacks(spec, options[0], rows, 3, 8, 8, dtype=dtype)


def shake(module: nn.Module) -> None:
    """Make weights that no initialisation makes: a teacher that differs, biases that are not 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def plugins_loss(method: str, options: Any, trunk: nn.Module, head: Any, teacher: Any, views: list[Tensor]) -> Tensor:
    """The same from the SPEC alone, each view by itself."""
    spec = METHODS[method]
    with FeatureTaps(trunk, spec.taps(options)) as taps:
        features = [encode(lambda images: trunk(images, [])[0], view) for view in views]
        maps = taps.take([view.shape[:-3] for view in views])
    z = project(head.projector, features)
    local = [head.projector.project_maps(view) for view in maps if view]
    p = z if spec.predictor is None else head.predictor.predict(z)
    if isinstance(head.projector, TwoBranchHead):
        target = [head.projector.teacher(h) for h in features]
    elif teacher is None:
        target = [view.detach() for view in z]
    else:
        with torch.no_grad():
            target = [teacher.heads[0].projector(teacher.trunk(view, [])[0]) for view in views]
    criterion = Objective(spec, options)
    criterion.allocate(len(z[0]))
    index = torch.arange(len(z[0])) if spec.indexed else None
    return criterion(Embeddings(z, p, target, index=index, maps=local)).loss


@pytest.mark.sample("isoloss-dtype0", "dissl-dtype1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [name for name in OF_IMAGES if name != "deepcluster_v2"])  # no labels, gradient 0
def test_loss_and_gradients_are_those_of_plugins(method: str, dtype: torch.dtype) -> None:
    task = built(method)
    torch.manual_seed(1)
    for module in (task.base_model, task.base_loss):
        module.to(dtype)
        shake(module)
    views = views_of(method, 6, dtype)
    alone = copy.deepcopy(task.base_model)
    teacher = copy.deepcopy(task.base_loss.teacher.module) if task.base_loss.teacher is not None else None
    assert (teacher is not None) == METHODS[method].teacher

    loss = vissl_loss(task, views)
    loss.backward()
    expected = plugins_loss(method, task.base_loss.options, alone.trunk, alone.heads[0], teacher, views)
    expected.backward()

    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(loss, expected, **tolerance)
    moved = 0
    for (name, ours), theirs in zip(task.base_model.named_parameters(), alone.parameters(), strict=True):
        assert ours.requires_grad or name == "heads.0.projector.6.bias"
        if not ours.requires_grad:
            continue
        torch.testing.assert_close(ours.grad, theirs.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        moved += float(ours.grad.abs().sum()) > 0
    assert moved > 27, "most parameters of a ResNet-8 and its head have a gradient"
    assert all(parameter.grad is None for parameter in task.base_loss.parameters())
    for (name, ours), theirs in zip(task.base_model.named_buffers(), alone.buffers(), strict=True):
        if "embedding_moment" not in name:
            torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.slow
@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("method", ["isoloss", "byol"])
def test_batches_of_any_collator(method: str) -> None:
    """simclr_collator's tensor is the views one after another; resolutions may differ with multicrop_collator."""
    torch.manual_seed(0)
    views = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    for batch, overrides in (
        (torch.cat(views), ["config.DATA.TRAIN.COLLATE_FUNCTION=simclr_collator"]),
        (views, ["config.MODEL.SINGLE_PASS_EVERY_CROP=false"]),
        ([views[0], views[1][:, :, 3:, 3:]], ["config.MODEL.SINGLE_PASS_EVERY_CROP=false"]),
    ):
        task = built(method, *overrides)
        reference = built(method, *overrides)
        loss = vissl_loss(task, batch)
        # the trunk sees images of one size together, the head each view by itself
        sizes = (
            [batch] if isinstance(batch, Tensor) else [torch.cat(batch)] if batch[0].shape == batch[1].shape else batch
        )
        model, teacher = reference.base_model, reference.base_loss.teacher.module
        z = [model.heads[0].projector(h) for h in torch.cat([model.trunk(images, [])[0] for images in sizes]).chunk(2)]
        with torch.no_grad():
            features = torch.cat([teacher.trunk(images, [])[0] for images in sizes])
            target = [teacher.heads[0].projector(h) for h in features.chunk(2)]
        embeddings = Embeddings(z, model.heads[0].predictor.predict(z), target)
        expected = METHODS[method].loss(reference.base_loss.options, LOCAL)(embeddings).loss
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["dissl", "cissl"])
def test_small_crops_are_students_alone(method: str) -> None:
    """Views of two sizes as multicrop_collator gives them; the trunk sees each by itself."""
    crops = "{name:ImgPilToMultiCrop,total_num_crops:5,size_crops:[16,8],num_crops:[2,3],crop_scales:[[0.1,1],[0.1,1]]}"
    task = built(method, f"config.DATA.TRAIN.TRANSFORMS=[{crops},{{name:ToTensor}}]")
    assert (task.base_model.heads[0].views, task.base_model.heads[0].large) == (5, 2)
    large, small = torch.randn(2, 6, 3, 16, 16), torch.randn(3, 6, 3, 8, 8)
    model = copy.deepcopy(task.base_model)
    features = [model.trunk(view, [])[0].flatten(1) for view in (*large, *small)]
    z = [model.heads[0].projector(h) for h in features]
    target = [model.heads[0].projector.teacher(h) for h in features[:2]]
    expected = METHODS[method].loss(task.base_loss.options, LOCAL)(Embeddings(z, z, target)).loss
    torch.testing.assert_close(vissl_loss(task, [*large, *small]), expected, rtol=1e-5, atol=1e-6)
    assert {"cosine_pos", "cosine_neg", "dist_to_etf", "z_std"} <= set(task.base_loss.metrics)


def test_without_momentum_the_student_is_the_teacher() -> None:
    task = built("isoloss", "++config.LOSS.isoloss.base_tau=0.0", "+config.LOSS.isoloss.final_tau=0.0")
    assert task.base_loss.teacher is None
    assert not task.base_loss.state_dict()
    views = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    alone = copy.deepcopy(task.base_model)
    expected = plugins_loss("isoloss", task.base_loss.options, alone.trunk, alone.heads[0], None, views)
    torch.testing.assert_close(vissl_loss(task, views), expected, rtol=1e-6, atol=1e-7)


def test_teacher_follows_the_schedule() -> None:
    """θ_t ← τ θ_t + (1 − τ) θ, τ from 0.5 to 1 over ten steps: τ_5 = 0.75."""
    task = built("byol", "++config.LOSS.byol.base_tau=0.5")
    teacher, model = task.base_loss.teacher, task.base_model
    before = [parameter.clone() for parameter in teacher.parameters()]
    shake(model)
    task.iteration, task.max_iteration = 5, 10
    EMATeacherHook().on_update(task)
    assert task.base_loss.tau == pytest.approx(0.75)
    student = [*model.trunk.parameters(), *model.heads[0].projector.parameters()]
    for old, new, now in zip(before, teacher.parameters(), student, strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * now)


def test_evaluation_returns_projections_and_does_not_update_the_predictor() -> None:
    task = built("isoloss")
    head = task.base_model.heads[0].eval()
    state = copy.deepcopy(head.state_dict())
    features = torch.randn(5, 64)
    (z,) = head(features)
    torch.testing.assert_close(z, head.projector(features))
    assert all(torch.equal(value, state[name]) for name, value in head.state_dict().items())


def test_process_groups_are_shared_by_teacher_and_student() -> None:
    """A group of processes, which SyncBatchNorm holds, cannot be copied."""

    class Group:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle a process group")

    group = Group()
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2, process_group=group))
    copied = copy_model(model)
    assert copied[1].process_group is group
    assert copied[0].weight is not model[0].weight
    assert torch.equal(copied[0].weight, model[0].weight)


@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained_once(method: str) -> None:
    task = built(method)
    task.optimizer = task._build_optimizer()
    task.optimizer_schedulers = task._build_optimizer_schedulers()
    task.prepare_optimizer()
    trained = [id(parameter) for group in task.optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(each) for each in task.base_model.parameters() if each.requires_grad)


def test_learning_rate_of_a_predictor() -> None:
    """BYOL's follows the schedule, ten times as high; SimSiam's stays at its peak: 0.008 · 32 / 256, ten times."""
    cosine = (1 + math.cos(math.pi * (0.5 - 0.1) / (1 - 0.1))) / 2
    for method, at_start, at_half in (
        ("byol", 0.0, 10 * 0.008 / 8 * cosine),
        ("simsiam", 10 * 0.008 / 8, 10 * 0.008 / 8),
    ):
        task = built(method)
        task.optimizer = task._build_optimizer()
        task.optimizer_schedulers = task._build_optimizer_schedulers()
        task.prepare_optimizer()
        predictor = {id(parameter) for parameter in task.base_model.heads[0].predictor.parameters()}
        for where, expected in ((0.0, at_start), (0.5, at_half)):
            task.optimizer._update_schedule(task.optimizer._run_schedulers(where, None))
            rates = {
                group["lr"]
                for group in task.optimizer.param_groups
                if any(id(parameter) in predictor for parameter in group["params"])
            }
            assert len(rates) == 1
            assert rates.pop() == pytest.approx(expected, rel=1e-6)


def test_closed_form_methods_have_no_learned_predictor() -> None:
    assert not list(built("isoloss").base_model.heads[0].predictor.parameters())


@pytest.mark.sample("overrides1-*", "overrides17-*")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["+config.LOSS.isoloss.alhpa=1.0"],
            "config.LOSS.isoloss: method isoloss has no option 'alhpa'; known options: alpha, base_tau",
        ),
        (["config.LOSS.isoloss.rho=high"], "config.LOSS.isoloss: method isoloss: rho must be a float, got 'high'"),
        (
            ["++config.LOSS.isoloss.base_tau=1.5"],
            "config.LOSS.isoloss: method isoloss: base_tau, final_tau: base must be",
        ),
        (
            ["++config.LOSS.isoloss.base_tau=true"],
            "LOSS.isoloss: method isoloss: base_tau must be a float, got True",
        ),
        (
            ["config.MODEL.HEAD.PARAMS=[[mlp,{dims:[64,128]}]]"],
            "LOSS.name=isoloss requires config.MODEL.HEAD.PARAMS",
        ),
        (["config.MODEL.HEAD.PARAMS=[[method_head,{}]]"], "method_head has exactly one option, in_dim"),
        (["config.MODEL.HEAD.PARAMS=[[method_head,{in_dim:64,foo:3}]]"], "method_head has exactly one option, in_dim"),
        (["config.MODEL.HEAD.PARAMS=[[method_head]]"], "method_head has exactly one option, in_dim"),
        (["config.MODEL.HEAD.PARAMS=[[method_head,{in_dim:2048}]]"], "the trunk's features, 64, got 2048"),
        (["config.LOSS.isoloss.proj_output_dim=0"], "config.LOSS.isoloss: "),
        (["config.LOSS.isoloss.rho=2.0"], "config.LOSS.isoloss: method isoloss: rho must be in [0, 1]"),
        (["config.LOSS.isoloss.rho=1.0"], "config.LOSS.isoloss: rho must be in [0, 1]"),
        (["config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=1"], "BATCHSIZE_PER_REPLICA of at least 2"),
        (["config.OPTIMIZER.use_larc=true"], "use_larc=true requires OPTIMIZER.name=sgd, got adamw"),
        (["config.TEST_MODEL=true"], "set config.TEST_MODEL=false"),
        (["config.DATA.TRAIN.TRANSFORMS=[{name:ToTensor}]"], "requires two views of each image"),
        (
            ["config.DATA.TRAIN.TRANSFORMS=[{name:ImgPilToMultiCrop,num_crops:[2,2],size_crops:[8,16]}]"],
            "large views come first, small crops after them: put the largest first, got views of sizes [8, 8, 16, 16]",
        ),
        (["config.DATA.TRAIN.COLLATE_FUNCTION=default_collate"], "got default_collate"),
        (
            ["config.LOSS.name=barlow_twins_loss"],
            "method_head requires config.LOSS.name to be one of amdim, barlow_twins, ",
        ),
    ],
)
def test_invalid_settings_raise_a_one_line_error(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        check_config(configuration("isoloss", *overrides))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_one_large_view_is_too_few_for_two_branches() -> None:
    crops = "[{name:ImgPilToMultiCrop,total_num_crops:3,size_crops:[16,8],num_crops:[1,2]},{name:ToTensor}]"
    with pytest.raises(UserError, match="cissl needs at least 2 large views, got 1 large view and 2 small crops"):
        check_config(configuration("cissl", f"config.DATA.TRAIN.TRANSFORMS={crops}"))


@pytest.mark.sample("mec-eps=0-*")
@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("matrix_ssl", "mce_order=0", "method matrix_ssl: mce_order must be in [1, inf), got 0"),
        ("matrix_ssl", "mce_mu=-1", "method matrix_ssl: mce_mu must be in [0, inf), got -1"),
        ("matrix_ssl", "mce_mu=nan", "method matrix_ssl: mce_mu must be in [0, inf), got nan"),
        ("matrix_ssl", "mce_mu=0 logarithm=exact", "mce_mu must be in [1e-06, inf), got 0.0"),
        ("mec", "eps=0", "method mec: eps must be in [1e-06, inf), got 0.0"),
        ("mec", "eps=2e-6", "config.LOSS.mec: eps must be in [8e-06, inf), got 2e-06"),
        ("mec", "eps=-64 warmup_iter=80", "method mec: eps must be in [1e-06, inf), got -64"),
        ("mec", "warmup_iter=-1", "method mec: warmup_iter must be in [0, inf), got -1"),
        ("dissl", "tau_teacher=0", "method dissl: tau_teacher must be in [1e-06, inf), got 0.0"),
        ("dissl", "n_classes=1", "method dissl: n_classes must be in [2, inf), got 1"),
        ("dissl", "beta_det_inv=-1", "method dissl: beta_det_inv must be in [0, inf), got -1"),
        ("cissl", "temperature=0", "method cissl: temperature must be in [1e-06, inf), got 0.0"),
        ("byol", "pred_lr_scale=-1", "method byol: pred_lr_scale must be in [1e-06, inf), got -1"),
        ("ssl_ey", "proj_output_dim=0", "method ssl_ey: proj_output_dim must be in [1, inf), got 0"),
    ],
)
def test_a_number_out_of_range_raises_a_one_line_error(method: str, given: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_config(configuration(method, *(f"++config.LOSS.{method}.{option}" for option in given.split())))
    assert message in str(error.value)
    assert str(error.value).startswith(f"config.LOSS.{method}: ") and "\n" not in str(error.value)


def test_width_of_the_trunk_is_checked() -> None:
    with pytest.raises(ValueError, match="in_dim=64, but the trunk's features have 100"):
        built("isoloss").base_model.heads[0](torch.randn(4, 100))


@pytest.mark.slow
def test_a_run_with_masks_sees_the_images_without_their_background(
    launch: Callable, few_digits: Path, black_masks: Callable, tmp_path: Path
) -> None:
    """All pixels are background, so that both views of all images are equal, and so are their embeddings."""
    remove = f"{{name:ImgPilRemoveBackground,masks:{black_masks(few_digits / 'train')},prob:1.0,fill:gray}}"
    crop = "{name:RandomResizedCrop,size:16,scale:[0.6,1.0]}"
    launch(
        *("config=pretrain/relicv2/digits", f"config.CHECKPOINT.DIR={tmp_path}", "config.OPTIMIZER.num_epochs=1"),
        f"config.DATA.TRAIN.TRANSFORMS=[{{name:ImgReplicatePil,num_times:2}},{remove},{crop},{{name:ToTensor}}]",
        *(f"config.LOSS.relicv2.{key}=8" for key in ("proj_hidden_dim", "proj_output_dim", "pred_hidden_dim")),
    )
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert abs(float(row["invariance"])) < 1e-9
    assert math.log(10) - 1e-4 <= float(row["contrastive"]) <= math.log(11) + 1e-4


def test_a_method_changes_the_trunk_and_evaluations_recognise_it() -> None:
    """DeepCluster with the Sobel filter, and the trunk of a kNN evaluation of its checkpoint."""
    task = built("deepcluster", "+config.LOSS.deepcluster.sobel=true")
    trunk = task.base_model.trunk
    assert isinstance(trunk._feature_blocks.conv1, SobelConv2d)
    words = [
        "config=benchmark/nearest_neighbor/digits/knn",
        "config.MODEL.WEIGHTS_INIT.PARAMS_FILE=/dev/null",
    ]
    config = convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1]
    model = build_model(config.MODEL, config.OPTIMIZER)
    parts = {"trunk": trunk.state_dict(), "heads": {}}
    model.init_model_from_weights_params_file(config, {"classy_state_dict": {"base_model": {"model": parts}}})
    images = torch.randn(2, 3, 16, 16)
    trunk.eval(), model.eval()
    assert torch.equal(model(images)[0].flatten(1), trunk(images)[0])
