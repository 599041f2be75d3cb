"""Accumulated gradients: a step of the optimizer counts once, in a plain loop and under Lightning."""

import pytest
import pytorch_lightning
import torch
from torch import Tensor, nn

from lightly_ext import lightning, models
from lightly_ext.names import CLASS_NAMES
from plugins.heads import Heads, TwoBranchHead
from plugins.methods import METHODS
from plugins.testing import toy_mlp, toy_views

pytestmark = pytest.mark.lightly

NAMES = {spec.name: name for name, spec in CLASS_NAMES.items()}
EXACT = {"rtol": 1e-12, "atol": 1e-12}
WARMUPS = {"dissl": {"warmup_beta_iter": 5}, "mec": {"warmup_iter": 5}}
COUNTING = ["dissl", "mec", "isoloss", "directcopy", "ssl_ey"]


def parts(method: str) -> dict:
    """Vectors for images, and no batch norm."""
    given: dict = {"projection_head": toy_mlp(6, 4), "input_dim": 6, **WARMUPS.get(method, {})}
    if METHODS[method].views is None:
        given["projection_head"] = TwoBranchHead(Heads(teacher=toy_mlp(6, 4), student=toy_mlp(6, 4)), 6)
    if "pred_hidden_dim" in METHODS[method].options:
        given["prediction_head"] = toy_mlp(4, 4)
    if method == "ssl_ey":
        given["log_eigvals"] = True
    return given


def built(method: str, **options: object) -> models.MethodModel:
    return vars(models)[NAMES[method]](toy_mlp(5, 6), **parts(method), **options).double()


def split(views: list[Tensor], count: int) -> list[list[Tensor]]:
    return [list(part) for part in zip(*(view.chunk(count) for view in views), strict=True)]


def same_state(one: nn.Module, other: nn.Module) -> None:
    state = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, state[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", COUNTING)
def test_a_plain_loop_counts_steps(method: str) -> None:
    """Only a loop without a teacher says when a step begins."""
    whole, accumulated = built(method), built(method)
    for seed in range(3):
        views = toy_views(8, 5, seed=seed)
        whole.loss(views)
        whole.update_momentum(0.9)
        if not METHODS[method].teacher:
            accumulated.before_step()
        for part in split(views, 4):
            accumulated.loss(part)
        accumulated.update_momentum(0.9)
    same_state(accumulated, whole)


def test_a_plain_loop_without_a_teacher_need_not_say_anything() -> None:
    model = built("mec", teacher=False)
    for _ in range(3):
        model.loss(toy_views(8, 5))
    assert int(model.objective.clock.steps) == 3


def trained(method: str, batches: list, **options: object) -> nn.Module:
    """After an epoch of Lightning that moves no weight."""
    given = parts(method)
    module = lightning.__getattr__(NAMES[method])(8, 4, toy_mlp(5, 6), optimizer="sgd", lr=0.0, **given).double()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    host = pytorch_lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet, **options)
    host.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    return module


@pytest.mark.parametrize("method", COUNTING)
def test_lightning_counts_steps(method: str) -> None:
    """The last of three steps has two micro-batches only."""
    steps = [toy_views(rows, 5, seed=rows) for rows in (16, 12, 8)]
    labels = torch.zeros(16, dtype=torch.int64)
    whole = trained(method, [(views, labels[: len(views[0])]) for views in steps])
    micro = [part for views in steps for part in split(views, len(views[0]) // 4)]
    micro = [*split(steps[0], 4), *split(steps[1], 4), *split(steps[2], 2)]
    accumulated = trained(method, [(views, labels[: len(views[0])]) for views in micro], accumulate_grad_batches=4)
    same_state(accumulated.objective, whole.objective)
    if method in ("isoloss", "directcopy"):
        same_state(accumulated.prediction_head, whole.prediction_head)
    assert int(accumulated.objective.clock.steps) == 3
