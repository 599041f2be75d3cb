"""SimCLR: known values, slow reference, the same as CISSL with one head, gradients, ranks, dtypes."""

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.distributed import LOCAL
from plugins.heads import SharedHead
from plugins.losses import SimCLRLoss, cissl_loss, simclr_loss, simclr_terms
from plugins.methods.simclr import SPEC
from plugins.objective import embed
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_views

SHAPES = [(4, 3, 2), (3, 7, 2), (5, 4, 3)]


def _reference_simclr(views, tau=0.5):
    """The formula row by row and column by column, in float64."""
    rows = {(v, i): np.asarray(row, np.float64) for v, view in enumerate(views) for i, row in enumerate(view)}
    unit = {key: row / max(np.linalg.norm(row), 1e-8) for key, row in rows.items()}
    total = 0.0
    for (v, i), row in unit.items():
        scores = {key: row @ other / tau for key, other in unit.items() if key != (v, i)}
        top = max(scores.values())
        log_mass = top + math.log(sum(math.exp(score - top) for score in scores.values()))
        total -= np.mean([scores[u, j] - log_mass for u, j in scores if j == i])
    return total / len(unit)


def _plain(views, tau=0.5):
    """NT-Xent of two views, left to autograd."""
    u = torch.nn.functional.normalize(torch.cat(views), dim=1)
    rows = len(views[0])
    logits = (u @ u.T / tau).fill_diagonal_(-torch.inf)
    return torch.nn.functional.cross_entropy(logits, torch.arange(2 * rows).roll(rows))


def test_known_values():
    same = torch.ones(2, 4, 3, dtype=torch.float64)
    assert simclr_loss(same).item() == pytest.approx(math.log(7), rel=1e-12)
    assert simclr_loss([*same, *same]).item() == pytest.approx(math.log(15), rel=1e-12)
    orthonormal = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    assert simclr_loss(orthonormal).item() == pytest.approx(math.log(1 + 6 * math.exp(-2)), rel=1e-12)
    assert simclr_loss(orthonormal, temperature=0.1).item() == pytest.approx(2.7236e-4, rel=1e-4)


def test_independent_unit_rows():
    """log(2N - 1) + 1 / (2 d τ²): what a network without agreement starts from."""
    views = torch.randn(2, 256, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tau in (0.5, 1.0):
        expected = math.log(511) + 1 / (2 * 128 * tau**2)
        assert simclr_loss(views, temperature=tau).item() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape):
    views = toy_views(*shape[:2], views=shape[2])
    for tau in (0.1, 0.5):
        expected = _reference_simclr(views, tau)
        assert simclr_loss(views, temperature=tau).item() == pytest.approx(expected, rel=1e-12)
        assert simclr_loss([view.float() for view in views], temperature=tau).item() == pytest.approx(
            expected, rel=1e-5, abs=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 6), width=st.integers(1, 8), views=st.integers(2, 4), exponent=st.integers(-4, 4))
def test_is_cissl_with_one_head_at_any_shape_and_scale(rows, width, views, exponent):
    z = [10.0**exponent * view for view in toy_views(rows, width, views=views)]
    loss = simclr_loss(z).item()
    assert loss == cissl_loss(z, list(z), temperature=0.5, positives="other").item()
    assert loss == pytest.approx(_reference_simclr(z), rel=1e-10)
    assert loss >= math.log(views - 1) - 1e-12


def test_gradient_is_that_of_autograd_and_orthogonal_to_the_rows():
    views = [view.requires_grad_() for view in toy_views(6, 4)]
    expected = torch.autograd.grad(_plain(views), views)
    found = torch.autograd.grad(3 * simclr_loss(views), views)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-11, atol=1e-13)
    for gradient, view in zip(found, views, strict=True):
        assert (gradient * view).sum(1).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda *z: simclr_loss(z), [*views, toy_views(6, 4, seed=1)[0].requires_grad_()])


def test_terms_and_module():
    views = [view.requires_grad_() for view in toy_views(5, 4, views=3)]
    terms = simclr_terms(views, temperature=0.2)
    assert terms.hat_H_m.item() == pytest.approx(math.log(14))
    assert terms.I_q_zm.item() == pytest.approx(math.log(14) - terms.loss.item())
    assert [term.requires_grad for term in terms] == [True, False, False]
    module = SimCLRLoss(temperature=0.2)
    assert torch.equal(module(views), terms.loss) and torch.equal(module(torch.stack(views)), terms.loss)
    assert "temperature=0.2" in repr(module)


def test_the_method_projects_all_views_together():
    options = SPEC.resolve({"proj_hidden_dim": 8, "proj_output_dim": 6, "temperature": 0.2})
    head = SPEC.head(5, options)
    assert isinstance(head, SharedHead)
    e = embed([torch.randn(4, 5) for _ in range(3)], head, large=2)
    assert torch.equal(SPEC.loss(options, LOCAL)(e).loss, simclr_loss(e.z, temperature=0.2)), "small crops are columns"


def _step(comm, model, *x):
    return simclr_loss([model(each) for each in x], comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
@pytest.mark.parametrize("views", [2, 3])
def test_ranks_equal_the_joined_batch(ranks, views, counts):
    assert_joined(ranks, _step, toy_views(sum(counts), 5, views=views), counts)


def _traffic(comm, *views):
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = simclr_loss([view.requires_grad_() for view in views], comm=comm)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
def test_sends_each_row_once_and_nothing_in_backward(ranks):
    parts = list(zip(*(view.split(6) for view in toy_views(12, 50)), strict=True))
    assert ranks.run(_traffic, parts) == [([2, 2 * 6 * 50, 1, 2 * 6], 0)] * 2


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for views, message in [
        ([z], "the SimCLR loss needs at least 2 views, got 1"),
        (z, r"views .* pass a list of views, such as \[v0, v1\]"),
        ([z, z[:, :2]], r"views\[1\] must have the shape of views\[0\], \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, "the SimCLR loss needs at least 2 rows over all processes, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            simclr_loss(views)
    for make in (SimCLRLoss, lambda **options: simclr_loss([z] * 2, **options)):
        with pytest.raises(ValueError, match="temperature"):
            make(temperature=0.0)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, device):
    for shape, dtype in itertools.product([(2, 5), (32, 8)], [torch.float32, torch.bfloat16, torch.float16]):
        views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
        loss = simclr_loss(views)
        expected = _reference_simclr([view.detach().double().cpu() for view in views])
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=2e-5, abs=1e-5)
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, views))


@pytest.mark.slow
def test_compiles_to_one_graph():
    views = [view.float().requires_grad_() for view in toy_views(8, 6)]
    compiled = torch.compile(simclr_loss, fullgraph=True, backend="aot_eager")
    expected, found = simclr_loss(views), compiled(views)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(value, views) for value in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
