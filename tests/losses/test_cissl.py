"""CISSL: known values, slow reference, optima, invariances, gradients, ranks, dtypes."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.losses import CISSLLoss, cissl_loss, cissl_terms
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views

POSITIVES = ("all", "other")
SHAPES = [(4, 3, 2), (3, 7, 2), (5, 4, 4)]


def _views(rows, width, views=2, seed=0):
    every = toy_views(rows, width, views=2 * views, seed=seed)
    return every[:views], every[views:]


def _reference_cissl(student, teacher, tau=0.07, positives="all"):
    """The formula row by row and column by column, in float64."""

    def unit(row):
        return row / math.sqrt(float(row @ row))

    student, teacher = (np.stack([np.asarray(v, dtype=np.float64) for v in views]) for views in (student, teacher))
    views, images, _ = student.shape
    total = 0.0
    for v, i in itertools.product(range(views), range(images)):
        u = unit(student[v, i])
        score = {(a, b): float(u @ unit(teacher[a, b])) / tau for a in range(len(teacher)) for b in range(images)}
        if positives == "other":
            score.pop((v, i), None)  # a small crop is no column
        top = max(score.values())
        log_mass = top + math.log(sum(math.exp(s - top) for s in score.values()))
        total -= np.mean([s - log_mass for (_, b), s in score.items() if b == i])
    return total / (views * images)


def _autograd_cissl(student, teacher, tau=0.07, positives="all"):
    """Compute the loss with a target for each column, for autograd."""
    u, w = (torch.nn.functional.normalize(torch.cat(views), dim=1) for views in (student, teacher))
    images = torch.arange(len(student[0])).repeat(len(student))
    target = (images[:, None] == images[None, : len(w)]).to(u)
    logits = u @ w.T / tau
    if positives == "other":
        own = torch.eye(len(u), len(w), dtype=torch.bool)
        logits, target = logits.masked_fill(own, -1e9), target.masked_fill(own, 0)
    return -(target / target.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()


# --- values ---------------------------------------------------------------------------------------------------------


def test_known_values():
    same = torch.ones(2, 4, 3, dtype=torch.float64)
    assert cissl_loss(same, same).item() == pytest.approx(math.log(8), rel=1e-12)
    assert cissl_loss(same, same).item() == pytest.approx(2.0794415, abs=1e-7)
    assert cissl_loss(same, same, positives="other").item() == pytest.approx(math.log(7), rel=1e-12)
    assert cissl_loss(same, same, positives="other").item() == pytest.approx(1.9459101, abs=1e-7)
    orthonormal = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    assert cissl_loss(orthonormal, orthonormal).item() == pytest.approx(
        math.log(2 + 6 * math.exp(-1 / 0.07)), rel=1e-12
    )
    assert cissl_loss(orthonormal, orthonormal).item() == pytest.approx(0.6931491, abs=1e-7)
    assert cissl_loss(orthonormal, orthonormal, positives="other").item() == pytest.approx(3.7492e-6, rel=1e-4)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, positives):
    student, teacher = _views(*shape)
    expected = _reference_cissl(student, teacher, positives=positives)
    assert cissl_loss(student, teacher, positives=positives).item() == pytest.approx(expected, rel=1e-12)
    singles = [view.float() for view in student], [view.float() for view in teacher]
    assert cissl_loss(*singles, positives=positives).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)  # eps D / τ


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("large", [2, 3])
def test_small_crops_are_rows_alone(positives, large):
    student, teacher = _views(4, 3, views=5)
    inputs = [view.clone().requires_grad_() for view in (*student, *teacher[:large])]
    loss = cissl_loss(inputs[:5], inputs[5:], positives=positives)
    assert loss.item() == pytest.approx(_reference_cissl(student, teacher[:large], positives=positives), rel=1e-12)
    assert torch.autograd.gradcheck(lambda *z: cissl_loss(z[:5], z[5:], positives=positives), inputs)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("large", [2, 3])
def test_rows_of_several_blocks(positives, large):
    """900 rows: a block begins amid the views of an image."""
    student, teacher = _views(300, 4, views=3)
    inputs = [view.clone().requires_grad_() for view in (*student, *teacher[:large])]
    loss, expected = (make(inputs[:3], inputs[3:], 0.5, positives) for make in (_loss, _autograd_cissl))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def _loss(student, teacher, tau, positives):
    return cissl_loss(student, teacher, temperature=tau, positives=positives)


def test_small_crops_have_a_column_more():
    student, teacher = _views(5, 4, 3)
    terms = cissl_terms(student, teacher[:2], positives="other")
    assert terms.hat_H_m.item() == pytest.approx((2 * math.log(9) + math.log(10)) / 3)
    assert terms.I_q_zm.item() == pytest.approx(terms.hat_H_m.item() - terms.loss.item())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 6),
    width=st.integers(1, 8),
    views=st.integers(2, 4),
    exponent=st.integers(-4, 4),
    tau=st.floats(0.03, 2),
    seed=st.integers(0, 99),
)
def test_equals_slow_reference_at_any_shape_scale_and_temperature(rows, width, views, exponent, tau, seed):
    student, teacher = ([10.0**exponent * view for view in side] for side in _views(rows, width, views, seed))
    for positives in POSITIVES:
        value = cissl_loss(student, teacher, temperature=tau, positives=positives).item()
        assert value == pytest.approx(_reference_cissl(student, teacher, tau, positives), rel=1e-10, abs=1e-10)


def test_one_head_without_its_own_view_is_simclr():
    z, _ = _views(5, 4)
    joined = torch.nn.functional.normalize(torch.cat(z), dim=1)
    logits = (joined @ joined.T / 0.2).fill_diagonal_(-torch.inf)
    target = torch.cat([torch.arange(5, 10), torch.arange(5)])
    expected = torch.nn.functional.cross_entropy(logits, target).item()
    assert cissl_loss(z, z, temperature=0.2, positives="other").item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("positives", "columns"), [("all", 15), ("other", 14)])
def test_terms_add_up(positives, columns):
    student, teacher = _views(5, 4, 3)
    student[0].requires_grad_()
    terms = cissl_terms(student, teacher, positives=positives)
    assert terms.hat_H_m.item() == pytest.approx(math.log(columns))
    assert terms.I_q_zm.item() == pytest.approx(math.log(columns) - terms.loss.item())
    assert [term.requires_grad for term in terms] == [True, False, False]


def test_module_is_the_function():
    student, teacher = _views(5, 4)
    for positives in POSITIVES:
        module = CISSLLoss(temperature=0.2, positives=positives)
        expected = cissl_loss(student, teacher, temperature=0.2, positives=positives)
        assert torch.equal(module(student, teacher), expected)
        assert torch.equal(module(torch.stack(student), torch.stack(teacher)), expected)
        assert positives in repr(module)


# --- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(2, 6), width=st.integers(1, 8), views=st.integers(2, 4), seed=st.integers(0, 99))
def test_is_bounded_below(rows, width, views, seed):
    student, _ = _views(rows, width, views, seed)
    assert cissl_loss(student, student).item() >= math.log(views) - 1e-12
    assert cissl_loss(student, student, positives="other").item() >= math.log(views - 1) - 1e-12


def test_invariances():
    student, teacher = _views(5, 4)
    for positives in POSITIVES:

        def loss(a, b, positives=positives):
            return cissl_loss(a, b, positives=positives).item()

        value = loss(student, teacher)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
        rotation, _ = torch.linalg.qr(toy_views(4, 4, views=1)[0])
        assert loss(student[::-1], teacher[::-1]) == pytest.approx(value, rel=1e-12)
        assert loss([v[order] for v in student], [v[order] for v in teacher]) == pytest.approx(value, rel=1e-12)
        assert loss([v @ rotation for v in student], [v @ rotation for v in teacher]) == pytest.approx(value, rel=1e-12)
        assert loss([3 * v for v in student], [v / 7 for v in teacher]) == pytest.approx(value, rel=1e-12)
        assert loss(teacher, student) != pytest.approx(value, rel=1e-3)
        assert loss([v[order] for v in student], teacher) != pytest.approx(value, rel=1e-3)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_autograd(shape, positives):
    student, teacher = ([view.requires_grad_() for view in views] for views in _views(*shape))
    expected = torch.autograd.grad(_autograd_cissl(student, teacher, positives=positives), student + teacher)
    found = torch.autograd.grad(3 * cissl_loss(student, teacher, positives=positives), student + teacher)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("positives", POSITIVES)
def test_gradient_of_one_head(positives):
    z = [view.requires_grad_() for view in _views(4, 3)[0]]
    expected = torch.autograd.grad(_autograd_cissl(z, z, positives=positives), z)
    found = torch.autograd.grad(cissl_loss(z, z, positives=positives), z)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("positives", POSITIVES)
def test_gradcheck(positives):
    views = [view.requires_grad_() for side in _views(3, 4) for view in side]
    assert torch.autograd.gradcheck(lambda *v: cissl_loss(v[:2], v[2:], temperature=0.5, positives=positives), views)


def test_no_gradient_is_made_where_none_is_wanted():
    student, teacher = _views(4, 3)
    assert not cissl_loss(student, teacher).requires_grad
    student[0].requires_grad_()
    with torch.no_grad():
        assert not cissl_loss(student, teacher).requires_grad
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(cissl_loss(student, teacher), student[0], create_graph=True)


# --- ranks ----------------------------------------------------------------------------------------------------------


def _step(comm, model, x0, x1, x2):
    z = [model(x) for x in (x0, x1, x2)]
    return cissl_loss([each.tanh() for each in z], z, comm=comm)


def _other_step(comm, model, x0, x1, _):
    z = [model(x) for x in (x0, x1)]
    return cissl_loss([each.flip(1) for each in z], z, positives="other", comm=comm)


def _crops_step(comm, model, x0, x1, x2):
    z = [model(x) for x in (x0, x1, x2)]
    return cissl_loss([each.flip(1) for each in z], z[:2], comm=comm)


def _other_crops_step(comm, model, x0, x1, x2):
    z = [model(x) for x in (x0, x1, x2)]
    return cissl_loss([each.flip(1) for each in z], z[:2], positives="other", comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("step", [_step, _other_step, _crops_step, _other_crops_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts)


def _of_rows(u, w, images):
    """The loss of each row u with columns w, of which two are its positives; left to autograd."""
    target = (images[:, None] == torch.arange(len(w)) // 2).to(u) / 2
    return -(target * (u @ w.T / 0.5).log_softmax(1)).sum(1)


def _of_own_rows(comm, joining, student, teacher):
    """Loss on this rank, and what DDP's mean over ranks takes of the gradients of its rows ``[B, 2, D]``.

    But for ``ours`` by autograd: rows and columns ``joined`` with gradient; columns ``cut``, those of other ranks
    without gradient; or the columns of this rank ``alone``.
    """
    student.requires_grad_(), teacher.requires_grad_()
    if joining == "ours":
        loss = cissl_loss(student.unbind(1), teacher.unbind(1), temperature=0.5, comm=comm)
    else:
        u, w = (torch.nn.functional.normalize(side.flatten(0, 1), dim=1) for side in (student, teacher))
        images, columns = torch.arange(len(u)) // 2, w
        if joining == "joined":
            u, columns = comm.gather_rows(u), comm.gather_rows(w)
            images = torch.arange(len(u)) // 2
        elif joining == "cut":
            images = images + comm.rank * len(student)
            parts = [*comm.gather_rows(w.detach()).split(len(w))]
            parts[comm.rank] = w
            columns = torch.cat(parts)
        loss = _of_rows(u, columns, images).mean()
    return loss.detach(), *(gradient / comm.size for gradient in torch.autograd.grad(loss, [student, teacher]))


@pytest.mark.ddp
@pytest.mark.parametrize("count", [2, 3])
def test_columns_need_to_be_joined_with_their_gradient(ranks, count):
    """A negative control of the tests above: wrongly gathered negatives give another loss or another gradient."""
    rows = 4
    student, teacher = (torch.stack(views, 1) for views in _views(count * rows, 5))
    parts = [*zip(student.clone().split(rows), teacher.clone().split(rows), strict=True)]
    student.requires_grad_(), teacher.requires_grad_()

    def run(joining):
        losses, of_students, of_teachers = zip(*ranks.run(_of_own_rows, [(joining, *p) for p in parts]), strict=True)
        return torch.stack(losses).mean(), torch.cat(of_students), torch.cat(of_teachers)

    u, w = (torch.nn.functional.normalize(side.flatten(0, 1), dim=1) for side in (student, teacher))
    by_row = _of_rows(u, w, torch.arange(len(u)) // 2)
    loss = by_row.mean()
    of_student, of_teacher = torch.autograd.grad(loss, [student, teacher], retain_graph=True)
    # the gradient of the columns of a rank from the rows of that rank alone
    own = [torch.autograd.grad(part.sum(), teacher, retain_graph=True)[0] / len(u) for part in by_row.split(2 * rows)]
    own = torch.cat([gradient.split(rows)[rank] for rank, gradient in enumerate(own)])

    exact = {"rtol": 1e-11, "atol": 1e-13}
    for joining in ("ours", "joined"):
        torch.testing.assert_close(run(joining), (loss.detach(), of_student, of_teacher), **exact)
    cut, alone = run("cut"), run("alone")
    torch.testing.assert_close(cut, (loss.detach(), of_student, own), **exact)
    assert alone[0] < loss - 0.1  # fewer negatives
    for found, right in ((cut[2], of_teacher), (alone[1], of_student), (alone[2], of_teacher)):
        assert (found - right).norm() > 0.1 * right.norm()


def _traffic(comm, student, teacher):
    """Numbers of floats sent in forward, and how often anything was sent in backward."""
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    student[0].requires_grad_()
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = cissl_loss(student, teacher, comm=comm)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
def test_sends_rows_and_a_number_for_each(ranks):
    student, teacher = _views(6, 50)
    for forward, backward in ranks.run(_traffic, [(student, teacher)] * 2):
        counts, rows, total, masses = forward
        assert (counts, rows, total, masses) == (2, 2 * 2 * 6 * 50, 1, 2 * 6)
        assert backward == 0


def _error(comm, student, teacher):
    try:
        cissl_loss(student, teacher, comm=comm)
    except ValueError as error:
        return str(error)


@pytest.mark.ddp
def test_one_image_over_all_ranks_is_refused(ranks):
    one, none = torch.ones(2, 1, 4), torch.ones(2, 0, 4)
    for message in ranks.run(_error, [(one, one), (none, none)]):
        assert message == "a contrastive loss needs at least 2 rows over all processes, got 1"


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match="at least 2 teacher views and at least as many student views, got 1 and 1"):
        cissl_loss([z], [z])
    with pytest.raises(ValueError, match="at least 2 teacher views and at least as many student views, got 3 and 2"):
        cissl_loss([z] * 2, [z] * 3)
    with pytest.raises(ValueError, match=r"teacher\[1\] must have the shape of student\[0\], \(4, 3\), got \(4, 2\)"):
        cissl_loss([z] * 2, [z, z[:, :2]])
    with pytest.raises(ValueError, match=r"student .* pass a list of views, such as \[s0, s1\]"):
        CISSLLoss()(z, z)
    with pytest.raises(ValueError, match="at least 2 rows over all processes, got 1"):
        cissl_loss([z[:1]] * 2, [z[:1]] * 2)
    for make in (CISSLLoss, lambda **options: cissl_loss([z] * 2, [z] * 2, **options)):
        with pytest.raises(ValueError, match="temperature"):
            make(temperature=0.0)
        with pytest.raises(ValueError, match="positives must be one of all, other, got 'own'"):
            make(positives="own")


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, positives, device):
    views = [view.to(device, dtype) for seed in (0, 1) for view in difficult_views(kind, *shape, seed=seed)]
    inputs = [view.clone().requires_grad_() for view in views]
    loss = cissl_loss(inputs[:2], inputs[2:], positives=positives)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))
    if kind == "zero":
        columns = 2 * shape[0] - (positives == "other")
        assert loss.item() == pytest.approx(math.log(columns), rel=1e-6)
    else:
        expected = _reference_cissl([v.double().cpu() for v in views[:2]], [v.double().cpu() for v in views[2:]],
                                    positives=positives)  # fmt: skip
        assert loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-5)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, dtype):
    """In float16 a cosine over 0.07 is off by up to 0.007, and its exponential by 0.7 %."""
    student, teacher = ([view.to(device, dtype) for view in views] for views in _views(64, 40))
    with torch.autocast(device, dtype=dtype):
        loss = cissl_loss(student, teacher)
    expected = _reference_cissl([v.float().cpu() for v in student], [v.float().cpu() for v in teacher])
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("positives", POSITIVES)
def test_compiles_to_one_graph(positives):
    views = [[view.float().requires_grad_() for view in side] for side in _views(8, 6)]
    compiled = torch.compile(cissl_loss, fullgraph=True, backend="aot_eager")
    expected, found = cissl_loss(*views, positives=positives), compiled(*views, positives=positives)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = views[0] + views[1]
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), rtol=1e-4, atol=1e-5
    )
