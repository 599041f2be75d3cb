"""A method with a memory of images, patches, a frozen and re-initialised predictor and a loss with parameters."""

import copy
import importlib
import json
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import vissl_ext.task  # patches VISSL before it is imported
from plugins.distributed import Collective
from plugins.methods import METHODS
from plugins.testing import RankPool
from plugins.tools.command import UserError
from vissl_ext.compat.rank_states import restore_rank_state
from vissl_ext.hooks import EMATeacherHook
from vissl_ext.life_cycle import LifeCycleHook, average_gradients, feed
from vissl_ext.model import adapt_trunk, check_adaptation
from vissl_ext.parts import check_transforms
from vissl_ext.registry import register
from vissl_ext.task import PluginTask, check_config
from vissl_ext.views import patches_of, resolutions, stack_count

# isort: split
from vissl.trainer.train_task import SelfSupervisionTask

register()
pytestmark = pytest.mark.vissl

EPOCHS = 2
STEPS = 6
"""More than those in which the predictor is frozen."""


def configuration(toys: ModuleType, *overrides: str) -> Any:
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    return convert_to_attrdict(compose_hydra_configuration([*toys.CONFIG, *overrides]), dump_config=False)[1]


def built(toys: ModuleType, *overrides: str) -> Any:
    """Task with the model, the optimiser and the loss that ``prepare`` builds."""
    task = PluginTask.from_config(configuration(toys, *overrides))
    torch.manual_seed(0)
    task.base_model = task._build_model()
    task.optimizer = task._build_optimizer()
    task.optimizer_schedulers = task._build_optimizer_schedulers()
    task.prepare_optimizer()
    task.base_loss = task._build_loss()
    return task


@pytest.mark.slow
def test_a_killed_training_of_two_processes_ends_the_same(
    few_digits: Path, tmp_path: Path, launches: Callable, toys: ModuleType, watched: ModuleType
) -> None:
    def job(kind: str, *more: str) -> dict[str, Any]:
        argv = [
            *(*toys.CONFIG, f"config.CHECKPOINT.DIR={tmp_path / kind}", "config.CHECKPOINT.CHECKPOINT_FREQUENCY=1"),
            *("config.DISTRIBUTED.NUM_PROC_PER_NODE=2", "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=16"),
            *(f"config.OPTIMIZER.num_epochs={EPOCHS}", *more),
        ]
        return {"argv": argv, "folder": str(few_digits.parents[1]), "watch": True, "toys": True}

    jobs = [job("whole"), {**job("cut"), "when": str(tmp_path / "cut" / "model_phase0.torch")}, job("cut")]
    results = launches(jobs)
    assert [result["status"] for result in results] == [0, -signal.SIGKILL, 0], results
    differ = json.loads((tmp_path / "whole" / watched.REPORT).read_text())
    steps = 96 // 32 * EPOCHS
    assert {"loss.objective.criterion.bank.rows", "loss.objective.criterion.scale"} < set(differ.pop("names"))
    assert differ.pop("clock") == [steps, steps // EPOCHS]
    assert set(differ) == {"start", *(f"step {step}" for step in range(1, steps + 1))}
    assert not any(differ.values()), differ
    one, other = (
        torch.load(tmp_path / kind / f"model_final_checkpoint_phase{EPOCHS - 1}.torch", weights_only=True)
        for kind in ("whole", "cut")
    )
    assert_same(one["loss"], other["loss"])
    for part in ("base_model", "optimizer", "loss"):
        assert_same(one["classy_state_dict"][part], other["classy_state_dict"][part])
    different = {name for state in one["classy_state_dict"]["loss_of_ranks"] for name in state}
    assert different and all(name.startswith("teacher.module.trunk.layers.1.running_") for name in different), different
    assert one["loss"]["objective.criterion.bank.rows"].shape == (96, toys.D)
    passes = one["classy_state_dict"]["base_model"]["model"]["heads"]["0.predictor.passes"]
    assert passes.tolist() == [EPOCHS, EPOCHS * 96, steps, steps]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal to the bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def trained(toys: ModuleType, batches: list[list[Tensor]], rank: int | None = None) -> dict[str, Tensor]:
    """Return the state of a training after VISSL's steps; if ``rank`` is None, in this process."""
    from classy_vision.generic.distributed_util import init_distributed_data_parallel_model, set_cpu_device

    task = built(toys)
    task.base_model.double().train()
    task.base_loss.double().allocate(12)
    for module in (*task.base_model.modules(), *task.base_loss.modules()):
        if isinstance(module, nn.BatchNorm2d):  # on a CPU its statistics would be those of one process
            module.eval()
    hooks, model, task.max_iteration = [LifeCycleHook(), EMATeacherHook()], task.base_model, STEPS
    hooks[0].on_start(task)
    if rank is not None:
        set_cpu_device()
        model = init_distributed_data_parallel_model(task.base_model, broadcast_buffers=True)
    for task.iteration, (index, images, stack) in enumerate(batches):
        (output,) = model([images, stack])
        task.last_batch = SimpleNamespace(sample={"input": [images, stack], "data_idx": [index.repeat(2)]})
        for hook in hooks:
            hook.on_forward(task)
        loss = task.base_loss(output, torch.zeros(1))
        task.optimizer.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.on_backward(task)
        task.optimizer.step(where=task.iteration / STEPS)
        for hook in hooks:
            hook.on_update(task)
    return {**task.base_model.state_dict(), **task.base_loss.state_dict(), "loss": loss.detach()}


def trained_as_rank(comm: Collective, batches: list[list[Tensor]], counts: list[int]) -> dict[str, Tensor]:
    sys.path.append(str(Path(__file__).with_name("in_ranks")))
    toys = importlib.import_module("toys")
    toys.install()
    ours = [[part.split(counts)[comm.rank] for part in batch] for batch in batches]
    return trained(toys, ours, comm.rank)


@pytest.mark.ddp
def test_two_processes_with_unequal_rows_step_as_one(toys: ModuleType) -> None:
    torch.manual_seed(1)
    batches = [
        [torch.randint(12, (10,)), *(torch.randn(10, *shape).double() for shape in ((3, 16, 16), (2, 3, 8, 8)))]
        for _ in range(STEPS)
    ]
    expected = trained(toys, batches)
    assert expected["heads.0.predictor.passes"].tolist() == [0, 0, STEPS, STEPS]
    weight = "heads.0.predictor.layer.weight"
    frozen = trained(toys, batches[:4])[weight]
    assert torch.equal(frozen, built(toys).base_model.state_dict()[weight].double())
    assert not torch.equal(frozen, expected[weight])
    with RankPool(2, timeout=600) as two:
        for result in two.run(trained_as_rank, [(batches, [6, 4])] * 2):
            assert result.keys() == expected.keys()
            for name, value in result.items():
                torch.testing.assert_close(
                    value, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
                )


def test_maps_and_loss_are_those_of_a_direct_computation(toys: ModuleType) -> None:
    """Only the student has maps; a pass over the training set and an evaluation have none."""
    task = built(toys)
    model, loss = task.base_model.double(), task.base_loss.double()
    loss.allocate(12)
    LifeCycleHook().on_start(task)
    model.trunk.layers[1].eval()  # its running statistics, so that the second pass is equal
    images, stack = torch.randn(5, 3, 16, 16).double(), torch.randn(5, 2, 3, 8, 8).double()
    (head,), layers = model.heads, model.trunk.layers
    with torch.no_grad():
        model.features(images)
    (output,) = model([images, stack])
    assert not any(module._forward_hooks for module in model.modules()) and all(m.ndim == 4 for m in output[-4:])
    assert len(loss.teacher([images])[0]) == 1 and len(model.eval()([images])[0]) == 1
    model.train().trunk.layers[1].eval()
    loss.teacher_output, loss.index = [torch.ones(5, toys.D).double()], torch.arange(5)
    rows = loss.objective.criterion.bank.rows[:5].clone()
    found = loss(output, torch.zeros(1))
    z, maps = [], []
    for view in (images[:, None], stack):
        early = torch.stack([layers[0](patch) for patch in view.unbind(1)], 1)
        late = torch.stack([layers[1](patch) for patch in early.unbind(1)], 1)
        features = torch.stack([layers[2:](patch) for patch in late.unbind(1)], 1)
        z.append(head.projector.layer(features.mean(1)))
        given = early.mean(1), nn.functional.adaptive_avg_pool2d(late.mean(1), 2)
        maps.append([conv(m) for conv, m in zip(head.projector.local, given, strict=True)])
    distances = (z[0] - rows).square().sum() + (z[1] - 1).square().sum()
    for view, places in zip(z[::-1], maps, strict=True):
        distances = distances + sum((view[:, :, None, None] - place).square().sum() for place in places) / 100
    parts = torch.stack([distances, sum(head.predictor.layer(view).square().sum() for view in z)])
    expected = (loss.objective.criterion.scale * parts).sum() / 5
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weights = [layers[0].weight, *(conv.weight for conv in head.projector.local)]
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("single", [False, True])
def test_the_maps_of_crops_of_two_resolutions_come_view_after_view(toys: ModuleType, single: bool) -> None:
    model = built(toys, f"config.MODEL.SINGLE_PASS_EVERY_CROP={single}").base_model.train()
    model.trunk.layers[1].eval()
    (head,) = model.heads
    head.views, head.large, head.stacks = 5, 2, 0
    head.predictor.before_step()
    views = [torch.randn(3, 3, side, side) for side in (16, 16, 8, 8, 8)]
    for batch, count in ((views, 5), (torch.cat(views[:2]), 2)):
        head.views = count
        (output,) = model(batch)
        assert len(output) == 4 * count
        for number, view in enumerate(views[:count]):
            early = model.trunk.layers[0](view)
            late = nn.functional.adaptive_avg_pool2d(model.trunk.layers[1](early), 2)
            found = output[2 * count + 2 * number :][:2]
            for conv, given, ours in zip(head.projector.local, (early, late), found, strict=True):
                torch.testing.assert_close(ours, conv(given))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING=true",
            r"toy compares feature maps, .*: set config.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING=",
        ),
        ("+config.LOSS.toy.module=layer9", r"config.MODEL.TRUNK: the backbone has no submodule 'layer9'"),
    ],
)
def test_trunks_without_maps_are_refused(toys: ModuleType, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(toys, override)


class _Two(Collective):
    """The other of two processes has the same gradients."""

    size = 2

    def sum(self, tensor: Tensor) -> Tensor:
        return 2 * tensor


def test_a_parameter_without_gradient_on_all_processes_stays_so() -> None:
    used, unused = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))
    used.grad = torch.arange(6.0).view(2, 3)
    average_gradients([used, unused], _Two())
    assert unused.grad is None and torch.equal(used.grad, torch.arange(6.0).view(2, 3))


PATCHES = {
    "jigsaw": {"side": 20, "window": 8, "grid": 2, "scale": [0.6, 1.0]},
    "rotation": {"side": 16, "scale": [0.2, 1.0]},
}


@pytest.mark.parametrize(("kind", "shape"), [("jigsaw", (4, 3, 8, 8)), ("rotation", (1, 3, 16, 16))])
def test_an_image_and_its_patches_are_a_view_and_a_stack(kind: str, shape: tuple[int, ...]) -> None:
    from vissl.config import AttrDict
    from vissl.data.collators import get_collator
    from vissl.data.ssl_transforms import get_transform

    entries = [
        {"name": "ImgPilToImageAndPatches", "image_size": 12, "interpolation": 3, kind: PATCHES[kind]},
        *({"name": name} for name in ("RandomHorizontalFlip", "ToTensor", "StackPatches")),
    ]
    transform = get_transform([AttrDict(entry) for entry in copy.deepcopy(entries)])
    torch.manual_seed(0)
    items = [
        transform(
            {"data": [Image.new("RGB", (40, 30), (9 * i, 0, 0))], "label": [i], "data_valid": [1], "data_idx": [i]}
        )
        for i in (5, 3)
    ]
    batch = get_collator("multicrop_collator", {})(items)
    view, stack = batch["data"][0]
    assert view.shape == (2, 3, 12, 12) and stack.shape == (2, *shape)
    for row, index in enumerate((5, 3)):
        assert stack[row, 0, 0].unique().tolist() == view[row, 0].unique().tolist() == [pytest.approx(9 * index / 255)]
    assert batch["data_idx"][0].tolist() == [5, 3, 5, 3]
    assert (stack_count(entries), patches_of(entries), resolutions(entries)) == (1, (shape[0], None, None), [(12, 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of jigsaw and rotation"),
        (PATCHES, "one of jigsaw and rotation"),
        ({"jigsaw": {"side": 21, "grid": 2}}, "multiple of grid"),
        ({"jigsaw": {"sides": 20}}, "sides"),
    ],
)
def test_patches_that_cannot_be_cut_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"ImgPilToImageAndPatches cannot be .*{message}"):
        check_transforms("config.DATA.TRAIN.TRANSFORMS", [{"name": "ImgPilToImageAndPatches", **options}])


def test_a_head_for_another_number_of_patches_is_refused_before_the_start() -> None:
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    method = next(name for name, spec in METHODS.items() if spec.stacks and "patches" in spec.options)
    for patches, refused in (
        (4, nullcontext()),
        (9, pytest.raises(UserError, match="stacks of 9 patches with these options, got stacks of 4 patches")),
    ):
        words = [f"config=pretrain/{method}/digits", f"config.LOSS.{method}.patches={patches}"]
        config = convert_to_attrdict(compose_hydra_configuration(words), dump_config=False)[1]
        with refused:
            check_config(config)


GRID = {"name": "ImgPilToPatches", "side": 16, "patch": 8, "stride": 4, "scale": [1.0, 1.0], "interpolation": 3}


def test_an_image_is_a_stack_of_a_grid_alone() -> None:
    from vissl.config import AttrDict
    from vissl.data.collators import get_collator
    from vissl.data.ssl_transforms import get_transform

    entries = [GRID, {"name": "ToTensor"}, {"name": "StackPatches", "views": 0}]
    transform = get_transform([AttrDict(entry) for entry in copy.deepcopy(entries)])
    images = [Image.new("RGB", (20, 20), (9 * i, 0, 0)) for i in (5, 3)]
    items = [transform({"data": [x], "label": [0], "data_valid": [1], "data_idx": [i]}) for i, x in enumerate(images)]
    (stack,) = get_collator("multicrop_collator", {})(items)["data"][0]
    assert stack.shape == (2, 9, 3, 8, 8)
    assert [row[:, 0].unique().tolist() for row in stack] == [[pytest.approx(9 * i / 255)] for i in (5, 3)]
    assert (stack_count(entries), patches_of(entries), resolutions(entries)) == (1, (9, 8, 4), [])


def _checked(method: str, *words: str) -> None:
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    words = (f"config=pretrain/{method}/digits", *words)
    check_config(convert_to_attrdict(compose_hydra_configuration([*words]), dump_config=False)[1])


ALONE = [name for name, spec in METHODS.items() if spec.only_stacks]


@pytest.mark.slow
@pytest.mark.parametrize("method", ALONE)
def test_a_grid_whose_patches_share_their_colours_is_warned_of(method: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*share its colours")
        _checked(method)
        for colours, shared in {
            "": True,
            "{name:ColorJitter,brightness:0.0,hue:0},{name:RandomGrayscale,p:0.0},": True,
            "{name:ImgPilRandomColorJitter,strength:0.0,p:1.0},": True,
            "{name:ImgPilMultiCropRandomApply,prob:[0.0],transforms:[{name:ColorJitter,hue:0.1}]},": True,
            "{name:ImgPilMultiCropRandomApply,prob:[0.5],transforms:[{name:RandomSolarize,p:0.0}]},": True,
            "{name:ColorJitter,hue:0.1},": False,
            "{name:RandomGrayscale},": False,
        }.items():
            grid = "{name:ImgPilToPatches,side:20,patch:8,stride:4}"
            words = f"config.DATA.TRAIN.TRANSFORMS=[{grid},{colours}{{name:ToTensor}},{{name:StackPatches,views:0}}]"
            with pytest.raises(UserWarning, match="share its colours") if shared else nullcontext():
                _checked(method, words)


@pytest.mark.parametrize("method", ALONE)
def test_views_beside_the_patches_and_other_patches_are_refused(method: str) -> None:
    for transforms, message in {
        "[{name:ImgPilToImageAndPatches,jigsaw:{side:20,window:8,grid:4}},{name:StackPatches}]": "needs no view beside",
        "[{name:ImgPilToPatches,side:24,patch:8,stride:4},{name:StackPatches,views:0}]": "got stacks of 25 patches of",
        "[{name:ImgPilToPatches,side:22,patch:10,stride:4},{name:StackPatches,views:0}]": "of 10 pixels at a distance",
        "[{name:ImgPilToPatches,side:21,patch:8,stride:4},{name:StackPatches,views:0}]": "side 20 is possible",
    }.items():
        with pytest.raises(UserError, match=message):
            _checked(method, f"config.DATA.TRAIN.TRANSFORMS={transforms}")


def test_a_trunk_is_evaluated_as_it_was_trained() -> None:
    """On patches, with the normalisation of each image by itself."""
    from vissl.config import AttrDict

    def settings(**options: Any) -> Any:
        return AttrDict({"TRUNK": AttrDict(options)})

    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = torch.randn(2, 3, 12, 12)
    adapt_trunk(settings(), trunk.eval())
    assert isinstance(trunk[1], nn.BatchNorm2d)
    adapt_trunk(settings(PER_SAMPLE_NORM=True), trunk)
    expected = torch.stack([trunk(images[:, :, i : i + 8, j : j + 8]) for i in (0, 4) for j in (0, 4)]).mean(0)
    assert isinstance(trunk[1], nn.GroupNorm)
    adapt_trunk(settings(PATCHES=[8, 4]), trunk)
    torch.testing.assert_close(trunk(images), expected)
    for options, message in (({"PATCHES": [8]}, "PATCHES must be"), ({"PER_SAMPLE_NORM": 1}, "must be true or false")):
        with pytest.raises(UserError, match=message):
            check_adaptation(settings(**options))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimiser_follows_the_hints(toys: ModuleType, optimizer: str) -> None:
    task = built(toys, f"config.OPTIMIZER.name={optimizer}")
    criterion, predictor = task.base_loss.objective.criterion, task.base_model.heads[0].predictor
    groups = task.optimizer.optimizer.param_groups
    of = {id(parameter): group for group in groups for parameter in group["params"]}
    trainable = [*task.base_model.parameters(), *criterion.parameters()]
    assert of.keys() == {id(parameter) for parameter in trainable} and len(of) == sum(len(g["params"]) for g in groups)
    task.optimizer._update_schedule(task.optimizer._run_schedulers(0.5, None))
    loss, predicted, trunk = (of[id(p)] for p in (criterion.scale, predictor.layer.weight, next(iter(trainable))))
    peak = max(task.optimizer_schedulers["lr"](step / 4096) for step in range(4096))
    assert loss["lr"] == pytest.approx(0.1 * peak) and predicted["lr"] == trunk["lr"] < peak
    assert loss["weight_decay"] == 0 and predicted["weight_decay"] == trunk["weight_decay"] == 0.01
    momenta = [group["momentum"] if optimizer == "sgd" else group["betas"][0] for group in (loss, predicted, trunk)]
    assert momenta == [0.9, 0.0, 0.9]


def test_a_memory_of_another_number_of_images_is_refused(toys: ModuleType) -> None:
    task, resumed = built(toys), built(toys)
    task.base_loss.allocate(6)
    state = task.base_loss.state_dict()
    restore_rank_state({"loss": state}, resumed.base_loss)
    resumed.base_loss.load_state_dict(state)
    with pytest.raises(UserError, match=r"config.DATA.TRAIN: the memory bank holds 6 images.*the training set has 7"):
        resumed.base_loss.allocate(7)
    resumed.base_loss.allocate(6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.DATA.TRAIN.TRANSFORMS=[{name:ToTensor}]", "toy needs 1 stack of patches per image, got none"),
        (
            "config.DATA.TRAIN.COLLATE_FUNCTION=simclr_collator",
            "requires config.DATA.TRAIN.COLLATE_FUNCTION=multicrop_collator, got simclr_collator",
        ),
    ],
)
def test_views_and_collators_that_the_method_cannot_take(toys: ModuleType, override: str, message: str) -> None:
    config = configuration(toys)
    check_config(config)
    with pytest.raises(UserError, match=message):
        check_config(configuration(toys, override))


def test_hints_for_missing_parameters_are_refused_before_the_start(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = replace(toys.SPEC, hints=lambda options: {"projector.last": toys.SPEC.hints(options)["loss"]})
    monkeypatch.setitem(vissl_ext.task.METHODS, "toy", wrong)
    with pytest.raises(UserError, match=r"toy gives hints for projector\.last, which have no parameters"):
        check_config(configuration(toys))


def test_a_pass_in_the_evaluation_view_needs_its_transforms(toys: ModuleType) -> None:
    task = built(toys, "config.DATA.TEST.TRANSFORMS=[]")
    task.datasets = {"train": SimpleNamespace(transform=None)}
    with pytest.raises(UserError, match=r"LOSS.name=toy reads the training images .* set config.DATA.TEST.TRANSFORMS"):
        next(feed(task)(view="eval"))


def test_an_epoch_drops_the_optimisers_state_of_parameters_that_it_initialises(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, calls = built(toys), []
    new = task.base_model.heads[0].predictor.layer.weight
    monkeypatch.setattr("vissl_ext.life_cycle.feed", lambda task: "pass")
    monkeypatch.setattr(task.base_loss.objective, "start_epoch", lambda *given: calls.append(given) or [new])
    task.train, task.train_phase_idx, state = True, 3, task.optimizer.optimizer.state
    state[new], state["another"] = {"momentum_buffer": 1}, {}
    LifeCycleHook().on_phase_start(task)
    assert list(state) == ["another"] and calls == [(3, "pass")]


def test_an_epoch_starts_once_also_if_it_has_phases_or_the_run_resumes_within_it(
    toys: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vissl_ext.life_cycle.feed", lambda task: "pass")
    monkeypatch.setattr(SelfSupervisionTask, "get_classy_state", lambda self, deep_copy: {})
    monkeypatch.setattr(SelfSupervisionTask, "_set_classy_state", lambda self, state: None)
    calls: list[Any] = []

    def task_from(state: dict[str, Any]) -> Any:
        task = built(toys)
        task.num_train_phases_per_epoch = 2
        monkeypatch.setattr(task.base_loss.objective, "start_epoch", lambda *given: calls.append(given) or [])
        task.train = True
        task._set_classy_state(state)
        return task

    def start(task: Any, phase: int) -> int | None:
        task.train_phase_idx = phase
        LifeCycleHook().on_phase_start(task)
        return task.base_loss.clock.epoch

    task = task_from({})
    for phase in range(3):
        start(task, phase)
    assert calls == [(0, "pass"), (1, "pass")]
    resumed = task_from(task.get_classy_state())
    assert start(resumed, 2) == 1 and start(resumed, 3) == 1 and len(calls) == 2
    start(resumed, 4)
    start(task_from({}), 2)  # from a checkpoint of an earlier release
    assert calls[2:] == [(2, "pass"), (1, "pass")]
