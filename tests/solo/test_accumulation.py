"""``accumulate_grad_batches``: a step of the optimiser counts once, whatever the number of its micro-batches."""

import pytest
import torch
from torch import Tensor, nn

from plugins.distributed import WORLD
from plugins.heads import Heads, TwoBranchHead
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.testing import OF_FEATURES, toy_mlp, toy_views
from plugins.tools.command import UserError
from solo_ext.compat import pl
from solo_ext.config import parse_pretrain
from solo_ext.registry import method_class

pytestmark = pytest.mark.solo

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SETTINGS = {
    "dissl": ["++method_kwargs.warmup_beta_iter=5"],
    "mec": ["++method_kwargs.warmup_iter=5"],
    "isoloss": ["++method_kwargs.alpha=1"],
}
WIDTH = 3 * 4 * 4  # of an image, flat


def built(compose, method: str, *overrides: str) -> nn.Module:
    """A method on vectors, without batch norm, in float64."""
    still = ["scheduler.name=none", "knn_eval.enabled=False", *SETTINGS.get(method, [])]
    cfg = parse_pretrain(compose(method, *still, *overrides))
    torch.manual_seed(0)
    model = method_class(cfg)(cfg)
    rows, D = model.features_dim, model.options[METHODS[method].width]
    heads = Heads(teacher=toy_mlp(rows, D), student=toy_mlp(rows, D))
    for prefix in ("", "momentum_") if METHODS[method].teacher else ("",):
        setattr(model, f"{prefix}backbone", nn.Sequential(nn.Flatten(), toy_mlp(WIDTH, rows)))
        two = isinstance(model.projector, TwoBranchHead)
        setattr(model, f"{prefix}projector", TwoBranchHead(heads, rows) if two else toy_mlp(rows, D))
    if "pred_hidden_dim" in METHODS[method].options:
        model.predictor = toy_mlp(D, D)
        model.predictor.predict = lambda z: [model.predictor(view) for view in z]
    model.objective = Objective(METHODS[method], model.options, WORLD, model.predictor, model.projector)
    if METHODS[method].teacher:
        students, teachers = zip(*model.momentum_pairs, strict=True)
        model.objective.set_teacher(teachers, students)
    return model.double()


def micro_batches(counts: tuple[int, ...], rows: int = 4) -> tuple[list, list]:
    """Batches of some micro-batches each, whole and split up."""
    whole, split = [], []
    for seed, count in enumerate(counts):
        views = [view.view(-1, 3, 4, 4) for view in toy_views(count * rows, WIDTH, seed=seed)]
        labels = torch.arange(count * rows) % 10
        whole.append((labels, views, labels))
        split += [(y, list(part), y) for *part, y in zip(*(t.split(rows) for t in (*views, labels)), strict=True)]
    return whole, split


def trained(model: nn.Module, batches: list, **options: object) -> nn.Module:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**{"max_epochs": 1, **options}, accelerator="cpu", devices=1, **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **EXACT, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
@pytest.mark.sample("isoloss")
@pytest.mark.parametrize("method", ["dissl", "mec", "isoloss", "ssl_ey"])
def test_accumulated_batches_are_one_step(method, compose) -> None:
    """The last of three steps has two micro-batches only; no weight moves."""
    whole, split = micro_batches((4, 4, 2))
    still = ("optimizer.lr=0", "optimizer.classifier_lr=0")
    one = trained(built(compose, method, *still), whole)
    other = trained(built(compose, method, *still), split, accumulate_grad_batches=4)
    same(other.objective.state_dict(), one.objective.state_dict())
    if method == "isoloss":
        same(other.predictor.state_dict(), one.predictor.state_dict())
        assert int(one.predictor.steps) == 2 * 3
    assert int(one.objective.clock.steps) == int(other.objective.clock.steps) == 3
    assert (other.objective.clock.total, other.objective.clock.steps_per_epoch) == (3, 3)


@pytest.mark.slow
@pytest.mark.sample("isoloss", "dissl")
@pytest.mark.parametrize("method", OF_FEATURES)
def test_the_joined_loss_trains_as_one_batch(method, compose) -> None:
    """Three steps, of 4, 4 and 2 micro-batches."""
    whole, split = micro_batches((4, 4, 2))
    settings = ("optimizer.name=sgd", "optimizer.lr=0.1", "optimizer.classifier_lr=1", "++optimizer.kwargs={}")
    one = trained(built(compose, method, *settings), whole)
    other = trained(built(compose, method, *settings, "++accumulate=joined"), split, accumulate_grad_batches=4)
    assert int(other.trainer.global_step) == int(one.trainer.global_step) == 3
    state = one.state_dict()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    fresh = built(compose, method).projector.state_dict()
    assert any(not torch.equal(value, fresh[name]) for name, value in one.projector.state_dict().items())
    logged = one.trainer.callback_metrics["train_ssl_loss_step"]
    torch.testing.assert_close(other.trainer.callback_metrics["train_ssl_loss_step"], logged, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_joined_is_a_sentence(compose) -> None:
    native = compose("byol", "++accumulate=joined", "~method_kwargs.log_eigvals", "~method_kwargs.pred_lr_scale")
    with pytest.raises(UserError, match="accumulate=joined is not available for solo-learn's own method byol"):
        method_class(parse_pretrain(native))
    with pytest.raises(UserError, match=r"cannot train momentum\.classifier"):
        built(compose, "isoloss", "++accumulate=joined", "++momentum.classifier=true")
    with pytest.raises(UserError, match="accumulate must be mean or joined, got 'sum'"):
        built(compose, "isoloss", "++accumulate=sum")


@pytest.mark.slow
@pytest.mark.sample("options1-*")
@pytest.mark.parametrize(
    ("options", "by_step", "by_epoch"),
    [
        ({"max_epochs": 4}, (2 * 5, 20), (2, 4)),
        ({"max_epochs": 4, "max_steps": 12}, (2 * 5, 12), (2, 3)),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, (2 * 3, 12), (2, 4)),
        ({"max_epochs": -1, "max_steps": 7, "accumulate_grad_batches": 2}, (2 * 3, 7), (2, 3)),
        ({"max_epochs": 4, "limit_train_batches": 3}, (2 * 3, 12), (2, 4)),
    ],
)
def test_schedules_follow_the_trainers_limits(options, by_step, by_epoch, compose) -> None:
    """Return the length of warm-up and schedule, in steps or epochs, for epochs of five batches."""
    for interval, wanted in (("step", by_step), ("epoch", by_epoch)):
        more = ("scheduler.name=warmup_cosine", f"++scheduler.interval={interval}", "++scheduler.warmup_epochs=2")
        model = trained(built(compose, "simsiam", *more), micro_batches((5,))[1], **options)
        schedule = model.trainer.lr_scheduler_configs[0].scheduler
        assert (schedule.warmup_steps, schedule.total_steps) == wanted


def test_a_run_without_an_end_is_a_sentence(compose) -> None:
    model = built(compose, "simsiam", "scheduler.name=warmup_cosine")
    with pytest.raises(UserError, match="do not give here; set max_steps"):
        trained(model, micro_batches((5,))[1], max_epochs=-1, max_time={"minutes": 1})
