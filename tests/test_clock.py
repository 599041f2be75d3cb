"""One clock: micro-batches whose gradients one optimiser step accumulates count as one step, and as one batch."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from plugins.clock import Clock
from plugins.distributed import LOCAL
from plugins.losses import ETFMonitor
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.predictors import ClosedFormPredictor, RunningMoment
from plugins.spec import Embeddings
from plugins.testing import toy_views

D = 4
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def steps(count: int = 3, rows: int = 12) -> Iterator[list[Tensor]]:
    """Two views of the rows of each step."""
    for seed in range(count):
        yield toy_views(rows, D, seed=seed)


def parts(views: list[Tensor], sizes: tuple[int, ...]) -> list[list[Tensor]]:
    """The micro-batches of a step."""
    return [list(part) for part in zip(*(view.split(list(sizes)) for view in views), strict=True)]


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3), (5, 4, 3)])
@pytest.mark.parametrize("mode", ["sequential", "pooled"])
@pytest.mark.parametrize(("every", "center", "alpha"), [(1, False, 0.5), (2, True, 1.0), (3, False, 0.5)])
def test_micro_batches_move_the_second_moment_as_one_batch(sizes, mode, every, center, alpha):
    options = {"rho": 0.7, "mode": mode, "every": every, "center": center, "alpha": alpha}
    whole, accumulated = (ClosedFormPredictor(D, **options).double() for _ in range(2))
    for views in steps():
        whole.predict(views)
        accumulated.before_step()
        for part in parts(views, sizes):
            accumulated.predict(part)
        accumulated.after_step()
        assert int(accumulated.steps) == int(whole.steps)
        for (name, one), other in zip(accumulated.named_buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(one, other, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def test_within_a_step_a_micro_batch_sees_those_before_it():
    predictor = ClosedFormPredictor(D, rho=0.7).double()
    before, views = predictor.C.clone(), next(steps())
    predictor.before_step()
    rows = 0
    for part in parts(views, (5, 4, 3)):
        predictor.predict(part)
        rows += len(part[0])
        first = 0.7 * before + 0.3 * views[0][:rows].T @ views[0][:rows] / rows
        torch.testing.assert_close(predictor.C, 0.7 * first + 0.3 * views[1][:rows].T @ views[1][:rows] / rows, **EXACT)


@pytest.mark.parametrize("center", [False, True])
def test_a_step_of_one_micro_batch_is_a_batch_to_the_bit(center):
    plain, stepped = (ClosedFormPredictor(D, rho=0.7, center=center, every=3) for _ in range(2))
    for views in steps(5):
        views = [view.float() for view in views]
        stepped.before_step()
        assert all(torch.equal(a, b) for a, b in zip(plain.predict(views), stepped.predict(views), strict=True))
        stepped.after_step()
        assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), stepped.buffers(), strict=True))


def test_a_micro_batch_that_is_not_finite_is_left_out():
    whole, accumulated = (RunningMoment(D, rho=0.7, center=True).double() for _ in range(2))
    views = next(steps())[:1]
    for bad in range(3):
        given = [part[0] for part in parts(views, (5, 4, 3))]
        given[bad] = torch.full_like(given[bad], torch.inf)
        whole.update(torch.cat([rows for rows in given if rows.isfinite().all()]))
        accumulated.before_step()
        for rows in given:
            accumulated.micro_batch()
            accumulated.update(rows)
        accumulated.after_step()
        torch.testing.assert_close(list(accumulated.buffers()), list(whole.buffers()), **EXACT)


def test_a_state_within_a_step_goes_on_with_a_new_step():
    predictor = ClosedFormPredictor(D, rho=0.7).double()
    first, second = parts(next(steps()), (6, 6))
    predictor.before_step()
    predictor.predict(first)
    resumed = ClosedFormPredictor(D, rho=0.7).double()
    resumed.before_step()
    resumed.predict(second)
    resumed.load_state_dict(predictor.state_dict())
    predictor.after_step()
    predictor.predict(second)
    resumed.predict(second)
    torch.testing.assert_close(resumed.state_dict(), predictor.state_dict(), rtol=0, atol=0)


def test_a_clock_that_is_loaded_within_a_step_counts_the_next_batch():
    clock = Clock()
    clock.before_step()
    clock()
    clock.load_state_dict({"steps": torch.tensor(7)})
    assert not clock.stepping
    assert (int(clock()), int(clock.steps), clock.first) == (7, 8, True)


def _objective(name: str, **options: object) -> Objective:
    spec = METHODS[name]
    resolved = spec.resolve({**options, spec.width: D})
    predictor = spec.predictor(resolved, LOCAL) if spec.predictor else None
    return Objective(spec, resolved, predictor=predictor).double()


@pytest.mark.parametrize(
    ("name", "warmup"),
    [("dissl", {"warmup_beta_iter": 4, "warmup_lambda_iter": 5, "stall_alarm_iter": 2}), ("mec", {"warmup_iter": 4})],
)
def test_warmups_follow_optimiser_steps(name, warmup):
    """Four micro-batches of the same rows a step have the losses of one."""
    whole, accumulated = _objective(name, **warmup), _objective(name, **warmup)
    for views in steps(6):
        e = Embeddings(views, views, views)
        loss = whole(e).loss
        accumulated.before_step()
        for _ in range(4):
            assert torch.equal(accumulated(e).loss, loss)
        accumulated.after_step()
    assert torch.equal(accumulated.clock.steps, whole.clock.steps) and int(whole.clock.steps) == 6
    if name == "dissl":
        assert accumulated.criterion.alarm.steps == whole.criterion.alarm.steps
    assert torch.equal(accumulated.state_dict()["criterion.counter.steps"], torch.tensor(6))


def test_what_is_followed_for_the_log_counts_a_step_once():
    whole, accumulated = (_objective("ssl_ey", log_eigvals=True) for _ in range(2))
    for views in steps():
        whole(Embeddings(views, views, views))
        accumulated.before_step()
        for part in parts(views, (5, 4, 3)):
            accumulated(Embeddings(part, part, part))
        accumulated.after_step()
    torch.testing.assert_close(accumulated.state_dict(), whole.state_dict(), **EXACT)
    assert int(whole.clock.steps) == int(accumulated.clock.steps) == 3
    assert set(whole.state_dict()) == {"embedding_moment.C", "embedding_moment.steps"}


def test_the_centre_of_the_cosines_counts_a_step_once():
    whole, accumulated = ETFMonitor(D).double(), ETFMonitor(D).double()
    for views in steps():
        whole(*views)
        accumulated.before_step()
        for part in parts(views, (5, 4, 3)):
            accumulated(*part)
        accumulated.after_step()
        torch.testing.assert_close(accumulated.mean, whole.mean, **EXACT)


def test_evaluation_counts_nothing_also_within_a_step():
    clock = Clock()
    clock.before_step()
    clock()
    clock.eval()
    assert int(clock()) == 1
    clock.train()
    assert int(clock()) == 0 and int(clock.steps) == 1


def test_an_objective_and_its_predictor_are_copied_together():
    spec = METHODS["isoloss"]
    predictor = spec.predictor(spec.resolve({"proj_output_dim": D}), LOCAL)
    module = torch.nn.ModuleList(
        [predictor, Objective(spec, spec.resolve({"proj_output_dim": D}), predictor=predictor)]
    )
    copied = copy.deepcopy(module)
    copied[1].before_step()
    assert copied[0].stepping and not predictor.stepping


def test_a_step_that_nobody_ends_is_reported(monkeypatch):
    monkeypatch.setattr("plugins.objective.PATIENCE", 3)
    objective, views = _objective("ssl_ey"), next(steps())
    e = Embeddings(views, views, views)
    for _ in range(5):
        objective.before_step()
        objective(e)
        objective.after_step()
    objective.before_step()
    with pytest.warns(UserWarning, match="3 batches belong to one optimizer step so far"):
        for _ in range(3):
            objective(e)
