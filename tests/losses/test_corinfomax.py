"""CorInfoMax: known values, slow reference, state over steps, gradients, ranks, dtypes."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plugins.checks import NotFiniteError
from plugins.distributed import LOCAL
from plugins.losses import CorInfoMaxLoss, corinfomax_loss, corinfomax_terms
from plugins.methods.corinfomax import SPEC
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views

SETTINGS = {"sim_weight": 3.0, "cov_weight": 0.7, "mean_momentum": 0.3, "covariance_momentum": 0.2, "eps": 1e-3}
SHAPES = [(6, 4), (5, 9), (40, 3)]
CROSS = torch.cat([torch.eye(4), -torch.eye(4)]).double()
"""Unit rows of mean 0 and covariance I / 4."""


class _Reference:
    """Row by row in float64, with the state of each view."""

    def __init__(self, views, width, start=1.0, **settings):
        self.mean, self.covariance = np.zeros((views, width)), np.stack([start * np.eye(width)] * views)
        defaults = {"sim_weight": 250, "cov_weight": 1, "mean_momentum": 0.01, "covariance_momentum": 0.01, "eps": 1e-8}
        self.settings = {**defaults, **settings}

    def __call__(self, views, move=True):
        s = self.settings
        units = [np.stack([row / np.linalg.norm(row) for row in view.detach().double().numpy()]) for view in views]
        n, d = units[0].shape
        means, covariances, logs = [], [], []
        for u, mean, covariance in zip(units, self.mean, self.covariance, strict=True):
            mean = s["mean_momentum"] * mean + (1 - s["mean_momentum"]) * u.mean(0)
            of_batch = sum(np.outer(row - mean, row - mean) for row in u) / n
            covariance = s["covariance_momentum"] * covariance + (1 - s["covariance_momentum"]) * of_batch
            means.append(mean), covariances.append(covariance)
            logs.append(np.log(np.linalg.eigvalsh(covariance + s["eps"] * np.eye(d))).sum() / d)
        if move:
            self.mean, self.covariance = np.stack(means), np.stack(covariances)
        pairs = combinations(range(len(units)), 2)
        return np.mean(
            [
                s["sim_weight"] * ((units[a] - units[b]) ** 2).mean() - s["cov_weight"] * (logs[a] + logs[b])
                for a, b in pairs
            ]
        )


def _plain(views, mean, covariance, sim_weight, cov_weight, mean_momentum, covariance_momentum, eps):
    """The formula, left to autograd."""
    units, logs = [F.normalize(view, dim=1) for view in views], []
    for u, before, matrix in zip(units, mean, covariance, strict=True):
        x = u - mean_momentum * before - (1 - mean_momentum) * u.mean(0)
        matrix = covariance_momentum * matrix + (1 - covariance_momentum) * x.T @ x / len(x)
        logs.append(torch.logdet(matrix + eps * torch.eye(len(matrix), dtype=matrix.dtype)) / len(matrix))
    values = [
        sim_weight * F.mse_loss(units[a], units[b]) - cov_weight * (logs[a] + logs[b])
        for a, b in combinations(range(len(units)), 2)
    ]
    return sum(values) / len(values)


def _some_state(views, width):
    generator = torch.Generator().manual_seed(1)
    mean = 0.3 * torch.randn(views, width, generator=generator, dtype=torch.float64)
    root = torch.randn(views, width, width + 1, generator=generator, dtype=torch.float64)
    return mean, root @ root.mT / width**2


# --- values ---------------------------------------------------------------------------------------------------------


def test_known_values():
    kept, eps = SETTINGS["covariance_momentum"], SETTINGS["eps"]
    log = math.log(kept + (1 - kept) / 4 + eps)  # the state is the identity, the covariance of the batch I / 4
    for sign, attraction in ((1, 0), (-1, 4 / 4)):
        terms = corinfomax_terms(7 * CROSS, sign * CROSS, **SETTINGS)
        assert terms.attraction.item() == pytest.approx(attraction, abs=1e-14)
        assert terms.log_det.item() == pytest.approx(log, rel=1e-12)
        assert terms.loss.item() == pytest.approx(3 * attraction - 0.7 * 2 * log, rel=1e-12)
    constant = torch.full((5, 4), 3.0, dtype=torch.float64)  # R is κ I, and along the rows κ + (1 - κ) λ_μ²
    log = 3 / 4 * math.log(kept + eps) + math.log(kept + eps + (1 - kept) * 0.3**2) / 4
    terms = corinfomax_terms(constant, constant, **SETTINGS)
    assert terms.log_det.item() == pytest.approx(log, rel=1e-12)


def test_spread_rows_are_the_minimum_and_a_constant_embedding_the_maximum():
    spread, collapsed = CorInfoMaxLoss(4), CorInfoMaxLoss(4)
    values = [(spread(CROSS, CROSS).item(), collapsed(*[torch.ones(8, 4)] * 2).item()) for _ in range(8)]
    assert values[-1][0] == pytest.approx(2 * math.log(4), rel=1e-6)
    assert values[-1][1] == pytest.approx(-2 * math.log(1e-8), rel=1e-6)  # 36.84
    assert values[2][1] - values[1][1] == pytest.approx(-2 * math.log(0.01), rel=0.01)  # until R reaches ε
    others = [corinfomax_loss(*[view] * 2, mean_momentum=0, covariance_momentum=0) for view in toy_views(20, 4)]
    assert all(value > 2 * math.log(4) for value in others)


@pytest.mark.parametrize("views", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference_over_steps(shape, views):
    """Two steps in training, one in evaluation, which leaves the state, and one more."""
    rows, width = shape
    reference = _Reference(views, width, start=0.5, **SETTINGS)
    loss = CorInfoMaxLoss(width, initial_covariance=0.5, **SETTINGS)
    single = CorInfoMaxLoss(width, initial_covariance=0.5, **SETTINGS)
    for step, training in enumerate([True, True, False, True]):
        z = toy_views(rows, width, views=views, seed=step)
        expected = reference(z, move=training)
        assert loss.train(training)(*z).item() == pytest.approx(expected, rel=1e-11)
        assert single.train(training)(*(view.float() for view in z)).item() == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(loss.mean.numpy(), reference.mean[: len(loss.mean)], rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(loss.covariance.numpy(), reference.covariance, rtol=1e-10, atol=1e-14)


def test_the_published_settings_are_the_defaults():
    z = toy_views(9, 4)
    terms = corinfomax_terms(*z)
    assert terms.loss.item() == pytest.approx(_Reference(2, 4)(z), rel=1e-11)
    assert terms.loss.item() == pytest.approx(250 * terms.attraction.item() - 2 * terms.log_det.item())
    assert CorInfoMaxLoss(4)(*z).item() == corinfomax_loss(*z).item() == terms.loss.item()
    module = CorInfoMaxLoss(4, **SETTINGS)
    assert module(*z).item() == corinfomax_loss(*z, **SETTINGS).item()
    assert "4, initial_covariance=1.0, sim_weight=3.0, cov_weight=0.7, mean_momentum=0.3" in repr(module)


def test_the_method_knows_the_published_names_and_has_the_published_heads():
    published = {"la_R": 0.2, "la_mu": 0.3, "R_ini": 0.5, "R_eps_weight": 1e-3, "sim_loss_weight": 3.0}
    options = SPEC.resolve({**published, "cov_loss_weight": 0.7, "proj_output_dim": 4, "proj_hidden_dim": 6})
    views = toy_views(8, 4, views=3)
    found = SPEC.loss(options, LOCAL)(Embeddings(views, views, views[:2]))
    assert found.loss.item() == pytest.approx(_Reference(3, 4, start=0.5, **SETTINGS)(views), rel=1e-11)
    for norm, names in ((False, "Linear ReLU Linear ReLU Linear"), (True, "Linear BatchNorm1d ReLU " * 2 + "Linear")):
        head = SPEC.head(5, {**options, "proj_norm": norm})
        assert [type(module).__name__ for module in head] == names.split()
        assert head[0].bias is not None and head[-1].bias is None


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances_with_the_first_state(shape):
    z0, z1 = toy_views(*shape)
    loss = corinfomax_loss(z0, z1).item()
    generator = torch.Generator().manual_seed(0)
    order, rotation = (
        torch.randperm(shape[0], generator=generator),
        torch.linalg.qr(toy_views(shape[1], shape[1])[0])[0],
    )
    scales = torch.rand(shape[0], 1, generator=generator, dtype=torch.float64) + 0.5
    assert corinfomax_loss(z1, z0).item() == pytest.approx(loss)
    assert corinfomax_loss(z0[order], z1[order]).item() == pytest.approx(loss)
    assert corinfomax_loss(z0 @ rotation, z1 @ rotation).item() == pytest.approx(loss)
    assert corinfomax_loss(scales * z0, 1e6 * z1).item() == pytest.approx(loss)
    assert corinfomax_loss(z0[order], z1).item() != pytest.approx(loss, rel=1e-3)  # the views must agree


def test_a_share_of_zero_forgets_the_state():
    views, state = toy_views(20, 4), dict(zip(("mean", "covariance"), _some_state(2, 4), strict=True))
    for momenta, equal in (({"mean_momentum": 0, "covariance_momentum": 0}, True), ({}, False)):
        with_state = corinfomax_loss(*views, **state, **momenta).item()
        assert (with_state == pytest.approx(corinfomax_loss(*views, **momenta).item(), rel=1e-6)) == equal


# --- state ----------------------------------------------------------------------------------------------------------


def _same_state(one, other, **tolerances):
    torch.testing.assert_close(dict(one.state_dict()), dict(other.state_dict()), **tolerances)


def test_micro_batches_of_a_step_move_the_state_once_as_one_batch():
    whole, parts = CorInfoMaxLoss(4, **SETTINGS), CorInfoMaxLoss(4, **SETTINGS)
    for seed in range(2):
        z = toy_views(7, 4, seed=seed)
        whole(*z)
        before = parts.covariance.clone()
        parts.before_step()
        for rows in (slice(0, 2), slice(2, 7)):
            parts(*(view[rows] for view in z))
            assert torch.equal(parts.covariance, before), "all micro-batches see the same state"
        parts.after_step()
        parts.after_step()
        _same_state(parts, whole, rtol=1e-12, atol=1e-15)
    for forget in (parts.discard_step, lambda: parts.load_state_dict(whole.state_dict())):
        parts.before_step()
        parts(*z)
        forget()
        parts.after_step()
        _same_state(parts, whole, rtol=1e-12, atol=1e-15)


def test_the_state_is_in_the_checkpoint_and_grows_with_the_number_of_views():
    z = toy_views(7, 4, views=4)
    loss = CorInfoMaxLoss(4, initial_covariance=0.5, **SETTINGS)
    assert loss.mean.shape == (0, 4), "by an empty buffer a framework knows that a checkpoint may have a longer one"
    loss(*z[:2])
    two = loss.covariance.clone()
    assert loss.eval()(*z) and loss.covariance.shape == (2, 4, 4), "an evaluation leaves the state"
    loss.train()(*z)
    assert loss.mean.shape == (4, 4) and not torch.equal(loss.covariance[:2], two)
    first = CorInfoMaxLoss(4, initial_covariance=0.5, **SETTINGS)
    first(*z)
    torch.testing.assert_close(loss.covariance[2:], first.covariance[2:])
    resumed = CorInfoMaxLoss(4, **SETTINGS)
    resumed.load_state_dict(loss.state_dict())
    assert torch.equal(resumed(*z), loss(*z))
    _same_state(resumed, loss)
    last = loss.covariance[2:].clone()
    loss(*z[:2])
    assert torch.equal(loss.covariance[2:], last), "that of a view which a batch lacks stays"
    with pytest.raises(RuntimeError, match="size mismatch for mean"):
        CorInfoMaxLoss(5).load_state_dict(loss.state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_an_incomplete_state_or_one_with_nan_is_not_loaded(strict):
    loss = CorInfoMaxLoss(4, **SETTINGS)
    loss(*toy_views(7, 4))
    whole = loss.state_dict()
    incomplete = {"mean": whole["mean"]}
    shorter = {**whole, "covariance": whole["covariance"][:1]}
    nan = {**whole, "covariance": whole["covariance"] * torch.nan}
    messages = [r"covariance must be \[2, 4, 4\], like mean"] * 2 + ["mean or covariance holds NaN or inf"]
    for state, message in zip((incomplete, shorter, nan), messages, strict=True):
        fresh = CorInfoMaxLoss(4, **SETTINGS)
        with pytest.raises(RuntimeError, match=message):
            fresh.load_state_dict(state, strict=strict)
        assert len(fresh.mean) == 0


def test_the_state_stays_in_float64():
    loss = CorInfoMaxLoss(4)
    loss(*toy_views(7, 4))
    before = loss.covariance.clone()
    for cast in (loss.half, loss.bfloat16, loss.float, loss.double):
        assert cast().covariance.dtype == torch.float64 and torch.equal(loss.covariance, before)


def test_rows_that_are_not_finite_do_not_stay_in_the_state(monkeypatch):
    loss, z = CorInfoMaxLoss(4), toy_views(7, 4)
    loss(*z)
    before = {name: state.clone() for name, state in loss.state_dict().items()}
    broken = [z[0], z[1].clone()]
    broken[1][2, 3] = torch.inf
    with pytest.raises(NotFiniteError, match="the CorInfoMax loss needs finite numbers, got NaN or inf in z1; "):
        loss(*broken)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # without the check, as on a GPU
    assert not loss(*broken).isfinite()
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_autograd(shape, views):
    z = [view.requires_grad_() for view in toy_views(*shape, views=views)]
    state = _some_state(views, shape[1])
    value = _plain(z, *state, **SETTINGS)
    loss = corinfomax_loss(*z, mean=state[0], covariance=state[1], **SETTINGS)
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)
    expected, found = torch.autograd.grad(value, z), torch.autograd.grad(3 * loss, z)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-10, atol=1e-13)


def test_only_the_loss_has_a_gradient():
    views = toy_views(5, 4)
    assert not corinfomax_loss(*views).requires_grad
    views[0].requires_grad_()
    assert [term.requires_grad for term in corinfomax_terms(*views)] == [True, False, False]
    with torch.no_grad():
        assert not corinfomax_loss(*views).requires_grad


def test_the_gradient_leaves_a_collapse():
    """Rows that nearly agree spread: one step of descent on the sphere lowers the loss, also in float32."""
    z = (torch.ones(8, 4) + 1e-3 * toy_views(8, 4)[0].float()).requires_grad_()
    loss = corinfomax_loss(z, z, mean_momentum=0, covariance_momentum=0)
    (gradient,) = torch.autograd.grad(loss, z)
    assert corinfomax_loss(*[z - 1e-3 * gradient / gradient.norm()] * 2).item() < loss.item() - 0.1


# --- ranks ----------------------------------------------------------------------------------------------------------


def _step(comm, model, *x):
    mean, covariance = _some_state(len(x), 4)
    return corinfomax_loss(*map(model, x), mean=mean, covariance=covariance, **SETTINGS, comm=comm)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1), (6, 0)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    assert_joined(ranks, _step, toy_views(sum(counts), 5, views=3), counts)


def _steps(comm, saved, *batches):
    loss = CorInfoMaxLoss(4, **SETTINGS, comm=comm)
    if saved is not None:
        loss.load_state_dict(saved)
    for views in batches:
        loss.before_step()
        for micro_batch in (slice(0, 2), slice(2, None)):
            loss(*(toy_mlp(5)(view[micro_batch]) for view in views))
        loss.after_step()
    return dict(loss.state_dict())


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(13,), (6, 7)])
def test_the_state_of_all_ranks_is_that_of_the_joined_batches_also_after_a_resume(ranks, counts):
    """Two steps on three ranks, and two more on as many ranks as there are counts, from the state of the first rank."""
    batches = [toy_views(13, 5, seed=seed) for seed in range(4)]

    def steps(counts, saved, batches):
        parts = [[view.split(counts) for view in views] for views in batches]
        of_ranks = [[[view[rank] for view in views] for views in parts] for rank in range(len(counts))]
        return ranks.run(_steps, [(saved, *of_rank) for of_rank in of_ranks])

    before = steps((3, 6, 4), None, batches[:2])
    after = steps(counts, before[0], batches[2:])
    expected = CorInfoMaxLoss(4, **SETTINGS)
    for of_ranks, joined in ((before, batches[:2]), (after, batches[2:])):
        for views in joined:
            expected(*(toy_mlp(5)(view) for view in views))
        for state in of_ranks:
            torch.testing.assert_close(state, dict(expected.state_dict()), rtol=1e-11, atol=1e-14)
            torch.testing.assert_close(state, of_ranks[0], rtol=0, atol=0)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z[:, :2]], {}, r"z1 must have the shape of z0, \(4, 3\), got \(4, 2\)"),
        ([z[:1]] * 2, {}, "the CorInfoMax loss needs at least 2 rows over all processes, got 1"),
        ([z] * 2, {"mean": torch.zeros(3, 3)}, r"mean must have shape \(2, 3\), got \(3, 3\)"),
        ([z] * 3, {"covariance": torch.eye(3)}, r"covariance must have shape \(3, 3, 3\), got \(3, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            corinfomax_loss(*arguments, **options)
    for options, message in [
        ({"sim_weight": -1}, r"sim_weight must be in \[0, inf\), got -1"),
        ({"cov_weight": math.nan}, r"cov_weight must be in \[0, inf\), got nan"),
        ({"mean_momentum": 1}, r"mean_momentum must be in \[0, 0.999\], got 1"),
        ({"covariance_momentum": 1}, r"covariance_momentum must be in \[0, 0.999\], got 1"),
        ({"eps": 0}, r"eps must be in \[1e-10, inf\), got 0"),
    ]:
        for call in (lambda o=options: corinfomax_loss(z, z, **o), lambda o=options: CorInfoMaxLoss(3, **o)):
            with pytest.raises(ValueError, match=message):
                call()
    for options, message in [
        ({"width": 0}, r"width must be in \[1, inf\), got 0"),
        ({"width": 3, "initial_covariance": -1}, r"initial_covariance must be in \[0, inf\), got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            CorInfoMaxLoss(**options)
    module = CorInfoMaxLoss(3)
    with pytest.raises(ValueError, match="the CorInfoMax loss needs at least 2 views, got 1"):
        module(z)
    with pytest.raises(ValueError, match=r"z0 must be \[B, 3\], the width of the module, got \(4, 2\)"):
        module(z[:, :2], z[:, :2])
    module.before_step()
    module(z, z, z)
    with pytest.raises(ValueError, match="all micro-batches of a step need the same number of views, got 3 and 2"):
        module(z, z)


def test_a_state_that_requires_a_gradient_gets_none():
    z, state = torch.eye(3), torch.eye(3).expand(2, 3, 3).clone().requires_grad_()
    assert not corinfomax_loss(z, z, covariance=state).requires_grad
    z.requires_grad_()
    corinfomax_loss(z, z, covariance=state, mean=torch.zeros(2, 3, requires_grad=True)).backward()
    assert state.grad is None and z.grad is not None


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite_also_after_the_first_state_is_forgotten(shape, kind, dtype, device):
    # to float32 once more: the gradient by rows of length 1e-4 may exceed 65504
    views = [view.to(device, dtype).float().requires_grad_() for view in difficult_views(kind, *shape)]
    loss = CorInfoMaxLoss(shape[1], eps=1e-10).to(device)
    for _ in range(12):  # R reaches ε where the rows have no variance
        value = loss(*views)
    gradients = torch.autograd.grad(value, views)
    assert value.isfinite() and loss(*(view.to(dtype) for view in views)).dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float64(dtype):
    views = [view.to(dtype) for view in toy_views(64, 24)]
    with torch.autocast("cpu", dtype=dtype):
        loss = corinfomax_loss(*views)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_Reference(2, 24)([view.double() for view in views]), rel=1e-5)


@pytest.mark.slow
def test_compiles_to_one_graph():
    views = [view.float().requires_grad_() for view in toy_views(8, 4)]
    compiled = torch.compile(corinfomax_loss, fullgraph=True, backend="aot_eager")
    expected, found = corinfomax_loss(*views), compiled(*views)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, views), torch.autograd.grad(expected, views))
