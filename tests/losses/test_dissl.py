"""DISSL: known values, slow reference, bounds, invariances, gradients, ranks, dtypes; warm-ups, alarm, monitor."""

import math
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from plugins.distributed import LOCAL
from plugins.losses import DISSLLoss, ETFMonitor, StallAlarm, dissl_blocks, dissl_loss, dissl_terms, dissl_warmup
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views, waves

SHAPES = [(2, 2), (2, 6), (2, 8), (4, 10), (1, 3), (3, 3)]
LOG8, LOG16384 = math.log(8), math.log(16384)


def _logits(teachers, students, rows=5, classes=7, seed=0):
    views = toy_views(rows, classes, views=teachers + students, seed=seed)
    return views[:teachers], views[teachers:]


def _reference_dissl(teacher, student, lam=2.3, beta=0.8, weight=1.0, tau_t=0.5, tau_s=1.0, first=None):
    """The formula pair by pair and row by row, in float64."""

    def softmax(row):
        e = np.exp(row - row.max())
        return e / e.sum()

    teacher = [np.asarray(view, dtype=np.float64) / tau_t for view in teacher]
    student = [np.asarray(view, dtype=np.float64) / tau_s for view in student]
    rows, first = len(teacher[0]), range(len(teacher)) if first is None else first
    p = [np.stack([softmax(row) for row in view]) for view in teacher]
    q = [np.stack([softmax(row) for row in view]) for view in student]

    def cross(a, b):
        return sum(-float(np.sum(a[i] * np.log(b[i]))) for i in range(rows)) / rows

    d = np.mean([cross(p[t], q[s]) for t in first for s in range(len(q)) if s != t])
    pairs = [cross(p[t], p[u]) for t in first for u in range(len(p)) if u != t]
    i = np.mean(pairs) if pairs else 0.0
    h = np.mean([-float(np.sum(p[t].mean(0) * np.log(p[t].mean(0)))) for t in first])
    own = np.mean([cross(p[t], p[t]) for t in first])
    return {
        "loss": weight * d - lam * h + beta * i,
        "distillation": d,
        "invariance": i,
        "H_M": h,
        "H_Mlz": np.mean([cross(view, view) for view in p]),
        "KL_invariance": i - own if pairs else 0.0,
        "KL_distillation": np.mean([cross(p[t], q[t]) for t in first]) - own,
    }


def _autograd_dissl(teacher, student, lam=2.3, beta=0.8, weight=1.0, tau_t=0.5, tau_s=1.0, first=None):
    """The double loop as published, left to autograd."""
    log_p = [(view / tau_t).log_softmax(1) for view in teacher]
    log_q = [(view / tau_s).log_softmax(1) for view in student]
    first = range(len(teacher)) if first is None else first
    d = [-(log_p[t].exp() * log_q[s]).sum(1).mean() for t in first for s in range(len(log_q)) if s != t]
    i = [-(log_p[t].exp() * log_p[u]).sum(1).mean() for t in first for u in range(len(log_p)) if u != t]
    h = [torch.special.entr(log_p[t].exp().mean(0)).sum() for t in first]
    return weight * sum(d) / len(d) - lam * sum(h) / len(h) + beta * (sum(i) / len(i) if i else 0)


@pytest.fixture(params=[None, 10], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """A block of 10 entries is one row of 7 classes."""
    if request.param is not None:
        monkeypatch.setitem(dissl_blocks.BLOCK, "cpu", request.param)


# --- values ---------------------------------------------------------------------------------------------------------


def _one_hot(classes, dtype=torch.float64):
    return 1000.0 * torch.eye(classes, dtype=dtype)


def test_known_values():
    uniform = torch.zeros(2, 4, 16384, dtype=torch.float64)
    terms = dissl_terms(uniform, uniform)
    assert terms.loss.item() == pytest.approx((1 - 2.3 + 0.8) * LOG16384, rel=1e-12)
    assert terms.loss.item() == pytest.approx(-4.85203, abs=1e-5)
    assert terms.H_M.item() == pytest.approx(LOG16384, rel=1e-12)
    collapsed = [_one_hot(32)[:1].repeat(8, 1)] * 2
    assert dissl_loss(collapsed, collapsed).item() == pytest.approx(0, abs=1e-12)
    distinct = [_one_hot(32)[:8]] * 2
    assert dissl_loss(distinct, distinct).item() == pytest.approx(-2.3 * LOG8, abs=1e-12)
    assert dissl_loss(distinct, distinct).item() == pytest.approx(-4.782716, abs=1e-6)
    # each of 8 rows uniform over 4 of 32 classes, its own
    own = torch.eye(8, dtype=torch.float64).repeat_interleave(4, 1) * 1000
    assert dissl_loss([own] * 2, [own] * 2).item() == pytest.approx(-5.475863, abs=1e-6)


def test_golden_values():
    # computed apart from this repository's losses, in numpy, pair by pair
    teacher, student = [waves(1.0, 6, 4), waves(1.1, 6, 4)], [waves(s, 6, 4) for s in (0.7, 0.9, 1.3)]
    assert dissl_loss(teacher, student).item() == pytest.approx(-0.4829488341832733, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, blocks):
    teacher, student = _logits(*shape)
    expected = _reference_dissl(teacher, student)
    for name, value in dissl_terms(teacher, student)._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
    singles = [view.float() for view in teacher], [view.float() for view in student]
    assert dissl_loss(*singles).item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("first", [[0], [1], [2, 0], [0, 1, 2]])
def test_assignment_views_are_the_first_of_each_pair(first):
    teacher, student = _logits(3, 5)
    expected = _reference_dissl(teacher, student, first=first)
    for name, value in dissl_terms(teacher, student, assignment_views=first)._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-12), name


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    classes=st.integers(1, 9),
    students=st.integers(2, 4),
    exponent=st.integers(-3, 1),
    taus=st.tuples(st.floats(0.1, 3), st.floats(0.1, 3)),
    weights=st.tuples(st.floats(0, 3), st.floats(0, 3), st.floats(0, 2)),
    seed=st.integers(0, 99),
)
def test_equals_slow_reference_at_any_setting(rows, classes, students, exponent, taus, weights, seed):
    teacher, student = _logits(2, students, rows, classes, seed)
    teacher, student = ([10.0**exponent * view for view in views] for views in (teacher, student))
    lam, beta, weight = weights
    options = {"lambda_maximality": lam, "beta_det_inv": beta, "distillation_weight": weight}
    value = dissl_loss(teacher, student, tau_teacher=taus[0], tau_student=taus[1], **options).item()
    assert value == pytest.approx(_reference_dissl(teacher, student, *weights, *taus)["loss"], rel=1e-10, abs=1e-10)


def test_stacked_views_are_the_list():
    teacher, student = _logits(2, 4)
    stacked = [torch.stack(views).requires_grad_() for views in (teacher, student)]
    lists = [[view.requires_grad_() for view in views] for views in (teacher, student)]
    expected = torch.autograd.grad(dissl_loss(*lists), lists[0] + lists[1])
    found = torch.autograd.grad(dissl_loss(*stacked), stacked)
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=0, atol=0)


def test_terms_add_up():
    teacher, student = _logits(2, 3)
    teacher[0].requires_grad_()
    terms = dissl_terms(teacher, student)
    total = terms.distillation - 2.3 * terms.H_M + 0.8 * terms.invariance
    assert terms.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert [term.requires_grad for term in terms] == [True] + [False] * 6
    agreeing = dissl_terms([teacher[0]] * 2, [2 * teacher[0]] * 2)  # 1 / tau_teacher
    assert agreeing.KL_invariance.item() == pytest.approx(0, abs=1e-12)
    assert agreeing.KL_distillation.item() == pytest.approx(0, abs=1e-12)


def test_module_is_the_function():
    teacher, student = _logits(2, 3)
    options = {"lambda_maximality": 2.0, "beta_det_inv": 0.5, "tau_teacher": 0.7, "tau_student": 0.9}
    module = DISSLLoss(**options, assignment_views=[1])
    expected = dissl_loss(teacher, student, **options, assignment_views=[1])
    assert torch.equal(module(teacher, student), expected)
    warm = module(teacher, student, beta_det_inv=torch.tensor(1.5))
    assert torch.equal(warm, dissl_loss(teacher, student, **{**options, "beta_det_inv": 1.5}, assignment_views=[1]))
    assert "beta_det_inv=0.5" in repr(module) and "tau_teacher=0.7" in repr(module)


# --- bounds and invariances -----------------------------------------------------------------------------------------


def _least(lam, beta, rows, classes):
    """The lower bound: for every h >= 0, I <= log min(B, C) and I + h <= log C."""
    fewest = math.log(min(rows, classes))
    if lam <= 1 + beta:
        return -lam * fewest
    return -lam * math.log(classes) + (1 + beta) * (math.log(classes) - fewest)


def test_lower_bounds_of_the_published_settings():
    assert _least(2.3, 0.8, 256, 16384) == pytest.approx(-14.8333, abs=1e-4)
    assert _least(2.3, 0.6, 2560, 16384) == pytest.approx(-19.349, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 9),
    lam=st.floats(0, 4),
    beta=st.floats(0, 2),
    scale=st.floats(0.01, 50),
    seed=st.integers(0, 99),
)
def test_is_bounded_below(rows, classes, lam, beta, scale, seed):
    teacher, _ = _logits(2, 2, rows, classes, seed)
    teacher = [scale * view for view in teacher]
    student = [2 * view for view in teacher]  # the same distributions
    loss = dissl_loss(teacher, student, lambda_maximality=lam, beta_det_inv=beta).item()
    assert _least(lam, beta, rows, classes) - 1e-9 <= loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "classes", "lam", "slack"), [(8, 32, 2.3, 0.06), (8, 32, 1.5, 1e-3), (32, 8, 2.3, 0.1), (8, 8, 2.3, 1e-3)]
)
def test_descent_reaches_the_bound_and_stays_above(rows, classes, lam, slack):
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(rows, classes, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    optimizer = torch.optim.Adam(heads, 0.3)
    for _ in range(500):
        optimizer.zero_grad()
        loss = dissl_loss([heads[0]] * 2, [heads[1]] * 2, lambda_maximality=lam)
        loss.backward()
        optimizer.step()
    least = _least(lam, 0.8, rows, classes)
    assert least - 1e-9 <= loss.item() <= least + slack


def test_invariances():
    teacher, student = _logits(2, 2)
    value = dissl_loss(teacher, student).item()
    close = pytest.approx(value, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    classes, rows = torch.randperm(7, generator=generator), torch.randperm(5, generator=generator)
    assert dissl_loss([v[:, classes] for v in teacher], [v[:, classes] for v in student]).item() == close
    assert dissl_loss(teacher[::-1], student[::-1]).item() == close
    assert dissl_loss([v[rows] for v in teacher], [v[rows] for v in student]).item() == close
    shift = torch.arange(5.0).unsqueeze(1)
    assert dissl_loss([v + shift for v in teacher], [v - 3 * shift for v in student]).item() == close
    assert dissl_loss([v[rows] for v in teacher], student).item() != pytest.approx(value, rel=1e-3)
    halves = [dissl_loss([v[h] for v in teacher], [v[h] for v in student]) for h in (slice(0, 3), slice(3, 5))]
    assert (3 * halves[0] + 2 * halves[1]).item() / 5 != pytest.approx(value, rel=1e-3)


def test_order_of_views_matters_with_more_student_views():
    teacher, student = _logits(2, 3)
    assert dissl_loss(teacher, student).item() != pytest.approx(dissl_loss(teacher, student[::-1]).item(), rel=1e-3)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_double_loop(shape, blocks):
    teacher, student = ([view.requires_grad_() for view in views] for views in _logits(*shape))
    expected = torch.autograd.grad(_autograd_dissl(teacher, student), teacher + student, materialize_grads=True)
    found = torch.autograd.grad(3 * dissl_loss(teacher, student), teacher + student)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("first", [[1], [2, 0]])
def test_gradient_with_few_assignment_views(first):
    teacher, student = ([view.requires_grad_() for view in views] for views in _logits(3, 4))
    views, plain = teacher + student, _autograd_dissl(teacher, student, 2, 0.5, 0.3, 0.7, 0.9, first)
    expected = torch.autograd.grad(plain, views, materialize_grads=True)  # a student view may have no other view
    options = {"lambda_maximality": 2, "beta_det_inv": 0.5, "distillation_weight": 0.3}
    loss = dissl_loss(teacher, student, **options, tau_teacher=0.7, tau_student=0.9, assignment_views=first)
    torch.testing.assert_close(torch.autograd.grad(loss, views), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4), (1, 2)])
def test_gradcheck(shape, blocks):
    views = [view.requires_grad_() for views in _logits(*shape, rows=3, classes=4) for view in views]
    assert torch.autograd.gradcheck(lambda *v: dissl_loss(v[: shape[0]], v[shape[0] :]), views)


def test_weights_may_be_tensors():
    teacher, student = ([view.requires_grad_() for view in views] for views in _logits(2, 3))
    numbers = {"lambda_maximality": 2.1, "beta_det_inv": 0.3, "distillation_weight": 0.4}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    results = []
    for weights in (numbers, tensors):
        loss = dissl_loss(teacher, student, **weights)
        results.append((loss, torch.autograd.grad(loss, teacher + student)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    singles = [view.float() for view in teacher]
    assert dissl_loss(singles, singles, **tensors).dtype == torch.float32


def test_no_gradient_is_made_where_none_is_wanted():
    teacher, student = _logits(2, 2)
    assert not dissl_loss(teacher, student).requires_grad
    before = [view.clone() for view in teacher + student]
    teacher[0].requires_grad_()
    with torch.no_grad():
        assert not dissl_loss(teacher, student).requires_grad
    assert dissl_loss(teacher, student).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, teacher + student, strict=True))


def test_second_derivatives_are_refused():
    teacher, student = ([view.requires_grad_() for view in views] for views in _logits(2, 2))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dissl_loss(teacher, student), teacher, create_graph=True)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _step(comm, model, *views):
    logits = [3 * model(view) for view in views]
    return dissl_loss(logits[:2], [-2 * logit.flip(1) for logit in logits], comm=comm)


def _first_only_step(comm, model, *views):
    logits = [3 * model(view) for view in views]
    return dissl_loss(logits[:2], logits, assignment_views=[1], beta_det_inv=torch.tensor(1.3), comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_step, _first_only_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts)


def _of_own_rows(comm, joining, teacher, student):
    """Loss on this rank, and what DDP's mean over ranks takes of the gradients of its rows.

    But for ``ours`` by autograd: the marginals ``joined`` with gradient, ``cut`` (joined, with gradient in this rank's
    share alone, which is not multiplied by the number of ranks), or of this rank ``alone``.
    """
    for view in teacher + student:
        view.requires_grad_()
    if joining == "ours":
        loss = dissl_loss(teacher, student, comm=comm)
    else:
        loss = _autograd_dissl(teacher, student, lam=0)
        for view in teacher:
            marginal = (view / 0.5).softmax(1).mean(0)
            if joining == "joined":
                marginal = comm.sum(marginal) / comm.size
            elif joining == "cut":
                others = comm.sum(marginal.detach()) - marginal.detach()
                marginal = (others + marginal) / comm.size
            loss = loss - 2.3 / len(teacher) * torch.special.entr(marginal).sum()
    return loss.detach(), [gradient / comm.size for gradient in torch.autograd.grad(loss, teacher + student)]


@pytest.mark.ddp
@pytest.mark.parametrize("count", [2, 3])
def test_marginals_need_to_be_joined_with_their_gradient(ranks, count):
    """A negative control of the tests above: a wrongly joined marginal gives another loss or another gradient."""
    rows = 4
    views = [[4 * view for view in side] for side in _logits(2, 3, count * rows, 6)]
    parts = [tuple([view[r * rows : (r + 1) * rows].clone() for view in side] for side in views) for r in range(count)]
    teacher, student = ([view.requires_grad_() for view in side] for side in views)

    def run(joining):
        losses, gradients = zip(*ranks.run(_of_own_rows, [(joining, *part) for part in parts]), strict=True)
        every = [torch.cat(of_view) for of_view in zip(*gradients, strict=True)]
        return torch.stack(losses).mean(), torch.cat(every[:2], 1), torch.cat(every[2:], 1)

    def expected(lam=2.3):
        loss = _autograd_dissl(teacher, student, lam)
        gradients = torch.autograd.grad(loss, teacher + student)
        return loss.detach(), torch.cat(gradients[:2], 1), torch.cat(gradients[2:], 1)

    def off(found):
        return ((found - of_teacher).norm() / of_teacher.norm()).item()

    loss, of_teacher, of_student = expected()
    exact = {"rtol": 1e-12, "atol": 1e-14}
    for joining in ("ours", "joined"):
        torch.testing.assert_close(run(joining), (loss, of_teacher, of_student), **exact)
    cut, alone = run("cut"), run("alone")
    torch.testing.assert_close(cut, (loss, expected(2.3 / count)[1], of_student), **exact)
    assert off(cut[1]) > 0.1
    assert alone[0] > loss + 0.1  # the entropy of a mean is at least the mean of the entropies
    assert off(alone[1]) > 0.1
    torch.testing.assert_close(alone[2], of_student, **exact)


def _traffic(comm, teacher, student):
    """Numbers of floats sent in forward, and how often anything was sent in backward."""
    sent = []

    def all_reduce(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    original = dist.all_reduce
    for view in teacher + student:
        view.requires_grad_()
    with mock.patch.object(dist, "all_reduce", all_reduce):
        loss = dissl_loss(teacher, student, comm=comm)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
def test_sends_marginals_and_a_few_sums(ranks):
    teacher, student = _logits(2, 3, 4, 50)
    for forward, backward in ranks.run(_traffic, [(teacher, student)] * 2):
        assert forward == [2 * 50 + 1, 5]
        assert backward == 0


def _terms(comm, teacher, student):
    return tuple(dissl_terms(teacher, student, comm=comm))


@pytest.mark.ddp
def test_terms_are_those_of_the_joined_batch(ranks):
    teacher, student = _logits(2, 3, 7, 6)
    parts = [([v[rows] for v in teacher], [v[rows] for v in student]) for rows in (slice(0, 2), slice(2, 7))]
    for terms in ranks.run(_terms, parts):
        torch.testing.assert_close(terms, tuple(dissl_terms(teacher, student)), rtol=1e-12, atol=1e-12)


def _error(comm, teacher, student):
    try:
        dissl_loss(teacher, student, comm=comm)
    except ValueError as error:
        return str(error)


@pytest.mark.ddp
def test_no_row_on_any_rank_is_refused(ranks):
    none = torch.ones(2, 0, 4)
    for message in ranks.run(_error, [(none, none)] * 2):
        assert message == "the DISSL loss needs at least 1 rows over all processes, got 0"


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"2 student views and as many student as teacher views, got 1 and 1"):
        dissl_loss([z], [z])
    with pytest.raises(ValueError, match="got 3 and 2"):
        dissl_loss([z] * 3, [z] * 2)
    with pytest.raises(ValueError, match="got 0 and 2"):
        dissl_loss([], [z] * 2)
    with pytest.raises(ValueError, match=r"student_logits\[1\] must have the shape of teacher_logits\[0\], \(4, 3\)"):
        dissl_loss([z] * 2, [z, z[:, :2]])
    with pytest.raises(ValueError, match=r"teacher_logits .* pass a list of views, such as \[t0, t1\]"):
        DISSLLoss()(z, z)
    with pytest.raises(ValueError, match=r"student_logits .* pass a list of views, such as \[s0, s1\]"):
        dissl_loss([z, z], z)
    for views in ([], [2], [0, 0], [-1]):
        with pytest.raises(ValueError, match="assignment_views must be different teacher views, 0 to 1"):
            dissl_loss([z] * 2, [z] * 2, assignment_views=views)
    for name in ("tau_teacher", "tau_student", "lambda_maximality", "beta_det_inv"):
        with pytest.raises(ValueError, match=name):
            dissl_loss([z] * 2, [z] * 2, **{name: -1})
        with pytest.raises(ValueError, match=name):
            DISSLLoss(**{name: -1})
    with pytest.raises(ValueError, match="at least 1 rows"):
        dissl_loss([z[:0]] * 2, [z[:0]] * 2)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite_and_right(shape, kind, dtype, device):
    views = [view.to(device, dtype) for seed in (0, 1) for view in difficult_views(kind, *shape, seed=seed)]
    inputs = [view.clone().requires_grad_() for view in views]
    loss = dissl_loss(inputs[:2], inputs[2:])
    gradients = torch.autograd.grad(loss, inputs)
    exact = [view.double().requires_grad_() for view in views]
    expected = dissl_loss(exact[:2], exact[2:])
    assert loss.dtype == torch.float32
    # float32 rounds a logit over tau = 1/2 to eps of its size, and its probability by that factor
    eps = 8 * torch.finfo(torch.float32).eps * max(1, 2 * max(view.abs().max().item() for view in exact))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-5, atol=2e-5 + eps)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        assert found.dtype == dtype
        rounding = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype] + eps
        torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=rounding * wanted.abs().max() + 1e-6)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, dtype):
    teacher, student = ([(10 * view).to(device, dtype) for view in views] for views in _logits(2, 2, 64, 40))
    with torch.autocast(device, dtype=dtype):
        loss = dissl_loss(teacher, student)
    expected = _reference_dissl(
        [v.cpu().float() for v in teacher],
        [v.cpu().float() for v in student],
    )["loss"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


def test_many_classes_keep_their_entropy():
    """Most probabilities are far below the 1.2e-7 at which a float32 Categorical would clamp them."""
    generator = torch.Generator().manual_seed(0)
    teacher = [8 * torch.randn(32, 16384, generator=generator) for _ in range(2)]
    exact = [view.double() for view in teacher]
    found, expected = dissl_terms(teacher, teacher), dissl_terms(exact, exact)
    torch.testing.assert_close(tuple(found), tuple(term.float() for term in expected), rtol=2e-5, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("students", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.bfloat16)])
def test_compiles_to_one_graph(students, dtype):
    views = [[view.to(dtype).requires_grad_() for view in views] for views in _logits(2, students, 8, 16)]
    compiled = torch.compile(dissl_loss, fullgraph=True, backend="aot_eager")
    expected, found = dissl_loss(*views), compiled(*views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = views[0] + views[1]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-5
    )


# --- warm-ups, alarm, monitor ---------------------------------------------------------------------------------------


def test_warmups_are_the_published_lines():
    for step in range(1, 15):
        for start, end, k, name, index in (
            (1.8, 2.3, 10, "warmup_lambda", 0),
            (2.3, 0.8, 10, "warmup_beta", 1),
            (0.0, 1.0, 10, "warmup_distillation", 2),
        ):
            expected = start + (end - start) * (1 + step) / k if step < k else end
            weights = dissl_warmup(torch.tensor(step), **{name: k})
            assert weights[index].item() == pytest.approx(expected, rel=1e-6)
    none = dissl_warmup(torch.tensor(1), lambda_maximality=2.0, beta_det_inv=0.6)
    assert [weight.item() for weight in none] == pytest.approx([2.0, 0.6, 1.0])


def test_warmup_weights_are_the_losses():
    teacher, student = _logits(2, 2)
    weights = dissl_warmup(torch.tensor(3), warmup_lambda=10, warmup_beta=10, warmup_distillation=10)
    expected = _reference_dissl(teacher, student, *(weight.item() for weight in weights))["loss"]
    assert dissl_loss(teacher, student, **weights._asdict()).item() == pytest.approx(expected, rel=1e-6)


def test_alarm_rings_once_after_the_warmup():
    alarm = StallAlarm(16, after=5, every=3)
    stalled = torch.tensor(0.96 * math.log(16))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rang = [step for step in range(1, 30) if alarm(stalled, step)]
    assert rang == [5]
    (warning,) = caught
    assert "after 5 steps their mean entropy is 96.0% of log 16" in str(warning.message)


def test_alarm_looks_again_at_intervals():
    alarm, uniform, learning = StallAlarm(16, after=5, every=3), torch.tensor(math.log(16)), torch.tensor(0.0)
    with pytest.warns(UserWarning, match="after 11 steps"):
        rang = [step for step in range(1, 30) if alarm(uniform if step >= 9 else learning, step)]
    assert rang == [11]


def test_alarm_is_silent_in_training_and_never_waits_between_looks():
    alarm = StallAlarm(16, after=0, every=10)
    assert not any(alarm(torch.tensor(0.94 * math.log(16)), step) for step in range(1, 42))
    unseen = mock.Mock(item=mock.Mock(side_effect=AssertionError("waited for the device")))
    assert not any(alarm(unseen, unseen) for _ in range(9))


def test_alarm_of_a_resumed_run_goes_on_counting():
    alarm = StallAlarm(16, after=100, every=10)
    with pytest.warns(UserWarning, match="after 110 steps"):
        assert [alarm(torch.tensor(math.log(16)), torch.tensor(step)) for step in (109, 110)] == [False, True]
    resumed = StallAlarm(16, after=100, every=10)
    resumed.load_state_dict(alarm.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(resumed(torch.tensor(math.log(16)), torch.tensor(step)) for step in range(111, 140))


def test_alarm_of_a_checkpoint_that_does_not_know_it_has_not_rung():
    alarm = StallAlarm(16, after=1)
    with pytest.warns(UserWarning, match="after 1 steps"):
        assert alarm(torch.tensor(math.log(16)), 1)
    assert alarm.load_state_dict({}) == ([], [])
    with pytest.warns(UserWarning, match="after 201 steps"):
        assert alarm(torch.tensor(math.log(16)), 201)


def test_the_method_saves_that_the_alarm_has_rung():
    spec = METHODS["dissl"]
    options = spec.resolve({"n_classes": 16, "stall_alarm_iter": 1})
    uniform = Embeddings(z=[torch.zeros(4, 16)] * 2, p=[], target=[torch.zeros(4, 16)] * 2)
    rung = spec.loss(options, LOCAL)
    with pytest.warns(UserWarning, match="after 1 steps"):
        rung(uniform)
    rung.counter.steps.fill_(200)  # the next look is in the next step
    resumed, older = spec.loss(options, LOCAL), spec.loss(options, LOCAL)
    resumed.load_state_dict(rung.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(uniform)
    older.load_state_dict({"counter.steps": torch.tensor(200)})
    with pytest.warns(UserWarning, match="after 201 steps"):
        older(uniform)


def test_alarm_can_ring_in_the_shortest_runs_on_digits():
    folder = Path(__file__).parents[2] / "configs" / "solo" / "digits" / "short"
    base, dissl = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("base", "dissl"))
    steps = base["max_epochs"] * (len(load_digits().target) - 500) // base["optimizer"]["batch_size"]
    options = METHODS["dissl"].resolve(dissl["method_kwargs"])
    alarm = METHODS["dissl"].loss(options, LOCAL).alarm
    uniform = torch.tensor(math.log(options["n_classes"]))
    with pytest.warns(UserWarning, match="DISSL has stalled"):
        assert any(alarm(uniform, step) for step in range(1, steps // 2 + 1))


def test_etf_of_a_simplex_is_ideal():
    classes = 6
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    terms = ETFMonitor(classes)(simplex, simplex)
    assert [term.item() for term in terms] == pytest.approx([1, -1 / (classes - 1), -1 / (classes - 1)])


def test_etf_monitor_follows_the_mean_in_training_only():
    z0, z1 = (view.float() for view in toy_views(9, 4))
    monitor, running = ETFMonitor(4), np.zeros(4)
    for training in (True, True, False, True):
        monitor.train(training)
        found = monitor(z0, z1)
        batch = torch.cat([z0, z1]).double().mean(0).numpy()
        x, y = (view.double().numpy() - (batch + running) / 2 for view in (z0, z1))
        x, y = (view / np.linalg.norm(view, axis=1, keepdims=True) for view in (x, y))
        m = x @ y.T
        positive, negative = np.diag(m).mean(), m[~np.eye(9, dtype=bool)].mean()
        assert [term.item() for term in found] == pytest.approx([positive, negative, 1 - positive + negative], abs=1e-5)
        if training:
            running = 0.9 * running + 0.1 * batch
        assert monitor.mean.numpy() == pytest.approx(running, abs=1e-5)
        z0, z1 = z0 + 1, z1 + 1
    assert not any(term.requires_grad for term in monitor(z0.requires_grad_(), z1))
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        monitor(z0[:1], z1[:1])
