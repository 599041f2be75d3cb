"""SwAV and SEER: known values, slow references of codes and loss, gradient, processes, difficult batches, queue."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.distributed import LOCAL
from plugins.losses import SwAVLoss, swav_loss, swav_terms
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.spec import Embeddings
from plugins.targets import sinkhorn_codes
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views


def _reference_codes(scores, epsilon=0.05, iterations=3):
    """The matrix itself, scaled in turn to the mass 1 / K of each prototype and 1 / N of each row; times N."""
    q = np.exp((scores - scores.max()) / epsilon).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * q.shape[0]
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


def _reference_swav(views, large=2, tau=0.1, queue=None, **options):
    views = [np.asarray(view, dtype=np.float64) for view in views]
    total = 0.0
    for a in range(large):
        rows = views[a] if queue is None else np.concatenate([np.asarray(queue[a]), views[a]])
        codes = _reference_codes(rows, **options)[-len(views[a]) :]
        for v, view in enumerate(views):
            for i, scores in enumerate(view / tau if v != a else []):
                log_mass = scores.max() + math.log(sum(math.exp(s - scores.max()) for s in scores))
                total -= sum(q * (s - log_mass) for q, s in zip(codes[i], scores, strict=True))
    return total / (large * (len(views) - 1) * len(views[0]))


def _scores(rows=6, prototypes=5, views=2, seed=0):
    return [view.tanh() for view in toy_views(rows, prototypes, views=views, seed=seed)]


def _unit(rows, width, seed, dtype=torch.float32):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


# --- codes ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    prototypes=st.integers(1, 7),
    epsilon=st.floats(0.02, 2),
    iterations=st.integers(1, 10),
    seed=st.integers(0, 99),
)
def test_codes_equal_the_slow_reference(rows, prototypes, epsilon, iterations, seed):
    scores = torch.stack(_scores(rows, prototypes, seed=seed))
    codes = sinkhorn_codes(scores, epsilon=epsilon, iterations=iterations)
    for view, found in zip(scores, codes, strict=True):
        expected = _reference_codes(view.numpy(), epsilon, iterations)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sinkhorn_codes(view, epsilon=epsilon, iterations=iterations), found)
    if (scores.amax() - scores.amin()) / epsilon < 70:  # beyond it, masses of prototypes are too small for float32
        found = sinkhorn_codes(scores.float(), epsilon=epsilon, iterations=iterations)
        np.testing.assert_allclose(found, codes, atol=2e-5)


@pytest.mark.parametrize(
    ("epsilon", "errors"), [(0.05, {1: 0.38, 3: 0.059, 10: 5e-5}), (0.03, {1: 0.86, 3: 0.34, 10: 0.013})]
)
def test_prototypes_approach_equal_masses_and_rows_have_them(epsilon, errors):
    """The worst relative error of a prototype's mass, for 512 random rows and 100 prototypes in 64 dimensions.

    It depends on the draw by a factor of 5: the draw of the numbers below is within the range of eight.
    """
    draws = [_unit(512, 64, s, torch.float64) @ _unit(100, 64, s + 9, torch.float64).T for s in range(8)]
    for iterations, size in errors.items():
        codes = sinkhorn_codes(torch.stack(draws), epsilon=epsilon, iterations=iterations)
        assert (codes.sum(2) - 1).abs().max() < 2e-15
        worst = (codes.sum(1) * 100 / 512 - 1).abs().amax(1)
        assert worst.min() < size < worst.max(), (iterations, worst)


def test_codes_ignore_a_constant_and_have_no_gradient():
    scores = _scores()[0].requires_grad_()
    codes = sinkhorn_codes(scores)
    assert not codes.requires_grad
    torch.testing.assert_close(sinkhorn_codes(scores + 7), codes, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("iterations", [1, 3, 10, 100])
def test_codes_of_scores_that_underflow_are_finite(iterations):
    """exp(s / ε) of the plain formula is 0 for whole rows or prototypes: 0 / 0."""
    for rows, prototypes in ((3, 3000), (64, 16)):
        hard = torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(0)) * 100
        lone = torch.zeros(rows, prototypes)
        lone[:, 0] = 100
        for scores in (hard, lone, torch.cat([hard, lone])):
            codes = sinkhorn_codes(scores, iterations=iterations)
            assert codes.isfinite().all()
            torch.testing.assert_close(codes.sum(1), torch.ones(len(scores)))


def test_wrong_options_of_codes_are_refused():
    with pytest.raises(ValueError, match="epsilon must be in"):
        sinkhorn_codes(torch.zeros(2, 2), epsilon=0.0)
    with pytest.raises(ValueError, match="iterations must be in"):
        sinkhorn_codes(torch.zeros(2, 2), iterations=0)


# --- loss -----------------------------------------------------------------------------------------------------------


def test_known_values():
    zero = [torch.zeros(4, 8, dtype=torch.float64)] * 3
    terms = swav_terms(zero)
    assert terms.loss.item() == pytest.approx(math.log(8)) and terms.code_entropy.item() == pytest.approx(math.log(8))
    # each row has its prototype: with hard codes the loss is log(1 + e^-10) at τ = 0.1
    own = [torch.eye(2, dtype=torch.float64)] * 2
    assert swav_loss(own, epsilon=0.01).item() == pytest.approx(math.log(1 + math.exp(-10)), rel=1e-10)


@pytest.mark.parametrize(("views", "large"), [(2, 2), (2, 1), (3, 1), (5, 2), (4, 4)])
@pytest.mark.parametrize("queued", [0, 3])
def test_equals_the_slow_reference(views, large, queued):
    scores = _scores(views=views)
    queue = _scores(queued, seed=5, views=large) if queued else None
    options = {"epsilon": 0.2, "iterations": 2}
    expected = _reference_swav(scores, large, 0.3, queue, **options)
    module = SwAVLoss(large=large, temperature=0.3, **options)
    assert module(scores, queue).item() == pytest.approx(expected, rel=1e-10)
    assert "temperature=0.3" in repr(module)
    floats = [[view.float() for view in each] if each else None for each in (scores, queue)]
    assert module(*floats).item() == pytest.approx(expected, rel=1e-5)


def test_random_views_and_identical_views():
    """log K + 1 / (2 d τ²) for independent unit rows; less if the views agree."""
    prototypes = _unit(3000, 128, 9)
    one, other = (_unit(256, 128, seed) @ prototypes.T for seed in (0, 1))
    assert swav_loss([one, other]).item() == pytest.approx(math.log(3000) + 1 / (2 * 128 * 0.1**2), abs=0.02)
    assert swav_loss([one, one]).item() == pytest.approx(6.94, abs=0.1)
    prototypes = _unit(16000, 256, 9)
    views = [_unit(16, 256, seed) @ prototypes.T for seed in (0, 1)]
    loss = swav_loss(views, iterations=10).item()
    assert loss == pytest.approx(math.log(16000) + 1 / (2 * 256 * 0.1**2), abs=0.03)


def test_invariances():
    scores = _scores(7, 5, views=3)
    value = swav_loss(scores).item()
    rows, columns = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) for n in (7, 5))
    assert swav_loss([view[rows] for view in scores]).item() == pytest.approx(value, rel=1e-12)
    assert swav_loss([view[:, columns] for view in scores]).item() == pytest.approx(value, rel=1e-12)
    assert swav_loss([view + 3 for view in scores]).item() == pytest.approx(value, rel=1e-12)
    assert swav_loss([scores[1], scores[0], scores[2]]).item() == pytest.approx(value, rel=1e-12)
    assert swav_loss([scores[0][rows], *scores[1:]]).item() != pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(("views", "large"), [(2, 2), (4, 2), (3, 1)])
def test_gradient_is_softmax_minus_codes_and_only_of_the_predictions(views, large):
    scores = [view.requires_grad_() for view in _scores(views=views)]
    codes = [sinkhorn_codes(view) for view in scores[:large]]
    gradients = torch.autograd.grad(swav_loss(scores, large=large), scores)
    for v, (view, gradient) in enumerate(zip(scores, gradients, strict=True)):
        expected = sum((view.div(0.1).softmax(1) - codes[a] for a in range(large) if a != v), torch.zeros_like(view))
        expected = expected / (0.1 * len(view) * (views - 1) * large)
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_wrong_input_is_refused():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"scores .* pass a list of views, such as \[s0, s1\]"):
        swav_loss(z)
    with pytest.raises(ValueError, match="at least 2 views, 2 of them large, got 1"):
        swav_loss([z])
    with pytest.raises(ValueError, match="at least 2 views, 3 of them large, got 2"):
        swav_loss([z, z], large=3)
    with pytest.raises(ValueError, match="queue_scores must be 2 matrices with 3 columns, one for each large view"):
        swav_loss([z, z], queue_scores=[z])
    with pytest.raises(ValueError, match="queue_scores must be 2 matrices with 3 columns"):
        swav_loss([z, z], queue_scores=[torch.zeros(2, 4)] * 2)
    with pytest.raises(ValueError, match="at least 1 rows over all processes, got 0"):
        swav_loss([z[:0], z[:0]])
    for make in (SwAVLoss, lambda **options: swav_loss([z, z], **options)):
        for name, value in (("temperature", 0.0), ("epsilon", 0.0), ("iterations", 0), ("large", 0)):
            with pytest.raises(ValueError, match=name):
                make(**{name: value})


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, device):
    for shape in ((1, 5), (2, 40), (40, 6)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
            loss = swav_loss(views)
            assert loss.dtype == torch.float32 and loss.isfinite()
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, views))
            if kind == "zero":
                assert loss.item() == pytest.approx(math.log(shape[1]), rel=1e-6)


def test_autocast_computes_in_float32():
    views = [view.bfloat16() for view in _scores(64, 40)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = swav_loss(views)
    assert loss.item() == pytest.approx(_reference_swav([view.double() for view in views]), rel=1e-5)


# --- processes ------------------------------------------------------------------------------------------------------


def _step(comm, model, *views):
    return swav_loss([model(x).tanh() for x in views], epsilon=0.2, comm=comm)


def _queue_step(comm, model, *views):
    queue = [view[comm.rank :: comm.size] for view in _scores(7, 4, seed=5)]
    return swav_loss([model(x).tanh() for x in views], epsilon=0.2, queue_scores=queue, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(8, 3), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_step, _queue_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts)


# --- the method -----------------------------------------------------------------------------------------------------


def _method(name="swav", comm=LOCAL, **given):
    """The objective and its prototypes, for projections of width 4."""
    torch.manual_seed(0)
    spec = METHODS[name]
    options = spec.resolve({"proj_output_dim": 4, "num_prototypes": 5, "freeze_prototypes_steps": 0, **given})
    predictor = spec.predictor(options, comm).double()
    return Objective(spec, options, comm, predictor, spec.head(3, options)).double(), predictor


def _embeddings(predictor, rows=6, views=3, seed=0):
    z = [F.normalize(view, dim=1) for view in toy_views(rows, 4, views=views, seed=seed)]
    return Embeddings(z, predictor.predict(z), z[:2])


def test_codes_come_from_the_queue_once_it_is_full():
    objective, predictor = _method(queue_size=9, queue_epoch=1, epsilon=0.2)
    seen = [[], []]
    for step in range(6):
        objective.start_epoch(step // 2)
        e = _embeddings(predictor, seed=step)
        # epoch 0: no queue; steps 2 and 3 fill it with 12 rows, of which 9 remain
        queue = [torch.cat(rows)[-9:] @ predictor.weight.detach().T for rows in seen] if step >= 4 else None
        expected = _reference_swav([view.detach() for view in e.p], 2, 0.1, queue, epsilon=0.2)
        assert objective(e).loss.item() == pytest.approx(expected, rel=1e-9), step
        for rows, view in zip(seen, e.z, strict=False):
            rows.extend([view] if step >= 2 else [])
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    assert {f"criterion.queues.{slot}.rows" for slot in (0, 1)} <= {*before}
    objective.eval()(_embeddings(predictor))
    torch.testing.assert_close(dict(objective.state_dict()), before, rtol=0, atol=0)
    other, _ = _method(queue_size=9, queue_epoch=1, epsilon=0.2)
    other.load_state_dict(before)
    for each in (objective.train(), other):
        each.start_epoch(3)
        each.criterion.attach(predictor, None)
    assert torch.equal(objective(e).loss, other(e).loss)


def test_the_queue_needs_the_epoch_and_codes_need_large_views():
    objective, predictor = _method(queue_size=9)
    with pytest.raises(ValueError, match=r"the queue begins in epoch 15, but .* or set queue_epoch to 0"):
        objective(_embeddings(predictor))
    objective, predictor = _method(code_views=3)
    with pytest.raises(ValueError, match="code_views=3 needs as many large views, got 2"):
        objective(_embeddings(predictor))


def test_prototypes_are_frozen_for_steps_and_seer_has_its_own_defaults():
    objective, predictor = _method(freeze_prototypes_steps=2)
    moved = []
    for step in range(4):
        objective.before_step()
        objective(_embeddings(predictor, seed=step)).loss.backward()
        objective.after_backward()
        moved.append(predictor.weight.grad is not None)
        predictor.weight.grad = None
        objective.after_step()
    assert moved == [False, False, True, True]
    assert METHODS["swav"].resolve({})["freeze_prototypes_steps"] == 313
    assert [METHODS[name].resolve({})["num_prototypes"] for name in ("swav", "seer")] == [3000, 16000]
    assert [METHODS[name].resolve({})["iterations"] for name in ("swav", "seer")] == [3, 10]
    options = {"proj_hidden_dim": 7, "proj_output_dim": 4}
    heads = {name: METHODS[name].head(3, METHODS[name].resolve(options)) for name in ("swav", "seer")}
    kinds = {name: " ".join(type(layer).__name__ for layer in head) for name, head in heads.items()}
    assert kinds == {
        "swav": "Linear BatchNorm1d ReLU Linear UnitRows",
        "seer": "Linear ReLU Linear ReLU Linear UnitRows",
    }
    rows = heads["seer"](torch.randn(5, 3))
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))


def _steps(comm, *batches):
    """Loss, gradient of the prototypes and queues after three steps; the queue is full in the last."""
    objective, predictor = _method(comm=comm, queue_size=9, queue_epoch=0, epsilon=0.2)
    for views in batches:
        z = [F.normalize(view, dim=1) for view in views]
        loss = objective(Embeddings(z, predictor.predict(z), z[:2])).loss
        gradient = torch.autograd.grad(loss, predictor.weight)[0]
    return loss.detach(), gradient, dict(objective.state_dict())


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(4, 3), (1, 4, 2)])
def test_ranks_share_the_queue(ranks, counts):
    batches = [torch.stack(toy_views(7, 4, views=3, seed=seed)) for seed in range(3)]
    loss, gradient, state = _steps(LOCAL, *batches)
    found = ranks.run(_steps, [*zip(*(batch.split(counts, 1) for batch in batches), strict=True)])
    mean = torch.stack([of_rank for _, of_rank, _ in found]).mean(0)
    torch.testing.assert_close(mean, gradient, rtol=1e-10, atol=1e-12)
    for their_loss, _, theirs in found:
        torch.testing.assert_close((their_loss, theirs), (loss, state), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiles_to_one_graph():
    scores = [view.float().requires_grad_() for view in _scores(views=3)]
    compiled = torch.compile(swav_loss, fullgraph=True, backend="aot_eager")
    expected, found = swav_loss(scores), compiled(scores)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, scores), torch.autograd.grad(expected, scores))
