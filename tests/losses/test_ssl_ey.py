"""SSL-EY: known values, slow reference, the paper's claims, gradients, ranks, dtypes, cost."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from torch.utils.flop_counter import FlopCounterMode

from plugins.losses import SSLEYLoss, ssl_ey_loss, ssl_ey_terms
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views, waves

FORMS = ("auto", "covariance", "gram")
ESTIMATORS = ("plugin", "split", "ustat")
SHAPES = [(6, 4), (5, 7), (9, 18), (40, 3)]


def _reference_ssl_ey(x, y):
    """The formula entry by entry, in float64: V is d x d, the divisor is the number of rows less one."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n, d = x.shape
    a, b = x - x.mean(0), y - y.mean(0)
    v, trace_c = np.zeros((d, d)), 0.0
    for i in range(n):
        v += (np.outer(a[i], a[i]) + np.outer(b[i], b[i])) / (n - 1)
        trace_c += 2 * float(a[i] @ b[i]) / (n - 1)
    return -2 * trace_c + float(np.trace(v @ v))


def _autograd_ssl_ey(x, y):
    """The formula as published, left to autograd."""
    n = x.shape[0]
    a, b = x - x.mean(0), y - y.mean(0)
    v = (a.T @ a + b.T @ b) / (n - 1)
    return -2 * torch.trace(2 / (n - 1) * a.T @ b) + torch.trace(v @ v)


def _squared_covariance(x, y, form, estimator):
    """The estimate of ||V||^2 inside the loss."""
    a, b = x - x.mean(0), y - y.mean(0)
    loss = ssl_ey_loss(x, y, form=form, estimator=estimator)
    return loss.item() + 4 * (a * b).sum().item() / (len(x) - 1)


def _orthonormal(rows, width):
    """Centred orthonormal columns."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.cat([torch.ones(rows, 1, dtype=torch.float64), random], 1))
    return q[:, 1:]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "value"), [((6, 4), 2.8674754263668776), ((5, 7), 8.237772993605379)])
def test_golden_values(form, shape, value):
    # computed apart from this repository, in numpy, from the formula of the paper
    loss = ssl_ey_loss(waves(1.0, *shape), waves(1.1, *shape), form=form)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert loss.dtype == torch.float64 and loss.shape == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "width"), [(12, 5), (9, 7), (6, 5)])
def test_known_values_of_orthonormal_columns(form, rows, width):
    q, k = _orthonormal(rows, width), rows - 1
    optimal, white = (k / 2) ** 0.5 * q, k**0.5 * q
    constant = torch.ones(rows, width, dtype=torch.float64)
    assert ssl_ey_loss(optimal, optimal, form=form).item() == pytest.approx(-width)
    assert ssl_ey_loss(white, white, form=form).item() == pytest.approx(0, abs=1e-12)
    assert ssl_ey_loss(optimal, -optimal, form=form).item() == pytest.approx(3 * width)
    assert ssl_ey_loss(constant, 2 * constant, form=form).item() == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(form, shape):
    x, y = toy_views(*shape)
    expected = _reference_ssl_ey(x, y)
    assert ssl_ey_loss(x, y, form=form).item() == pytest.approx(expected, rel=1e-12)
    assert ssl_ey_loss(x.float(), y.float(), form=form).item() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 12), width=st.integers(1, 30), exponent=st.integers(-4, 4), seed=st.integers(0, 99))
def test_equals_slow_reference_at_any_shape_and_scale(rows, width, exponent, seed):
    x, y = (10.0**exponent * view for view in toy_views(rows, width, seed=seed))
    for form in FORMS:
        value = ssl_ey_loss(x, y, form=form).item()
        scale = _reference_ssl_ey(x, x) + 4 * x.var(0).sum().item()  # of the parts that may cancel
        assert value == pytest.approx(_reference_ssl_ey(x, y), rel=1e-12, abs=1e-12 * abs(scale))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_terms_add_up(estimator):
    x, y = toy_views(9, 6)
    x.requires_grad_()
    terms = ssl_ey_terms(x, y, estimator=estimator)
    assert (terms.whitening + terms.alignment - 6).item() == pytest.approx(terms.loss.item(), rel=1e-12)
    a, b = x - x.mean(0), y - y.mean(0)
    assert terms.alignment.item() == pytest.approx(2 / 8 * (a - b).square().sum().item(), rel=1e-12)
    assert [term.requires_grad for term in terms] == [True, False, False]
    if estimator == "plugin":
        v = (a.T @ a + b.T @ b) / 8
        assert terms.whitening.item() == pytest.approx((v - torch.eye(6)).square().sum().item(), rel=1e-12)


def test_module_is_the_function():
    x, y = toy_views(9, 6)
    for form, estimator in itertools.product(FORMS, ESTIMATORS):
        module = SSLEYLoss(form=form, estimator=estimator)
        assert torch.equal(module(x, y), ssl_ey_loss(x, y, form=form, estimator=estimator))
        assert estimator in repr(module)


# --- properties -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(2, 10), width=st.integers(1, 20), scale=st.floats(0.01, 3), seed=st.integers(0, 99))
def test_is_bounded_below(rows, width, scale, seed):
    x, y = (scale * view for view in toy_views(rows, width, seed=seed))
    assert ssl_ey_loss(x, y).item() >= -min(width, rows - 1) - 1e-10


def test_floor_is_reached_when_wider_than_the_batch():
    # at D >= N the floor is -(N - 1), which memorised pairs reach: values compare only at equal N and D
    simplex = torch.eye(5, 16, dtype=torch.float64) * (4 / 2) ** 0.5
    assert ssl_ey_loss(simplex, simplex).item() == pytest.approx(-4)


@pytest.mark.parametrize("estimator", ["plugin", "ustat"])
def test_invariances(estimator):
    def loss(a, b):
        return ssl_ey_loss(a, b, estimator=estimator).item()

    x, y = toy_views(9, 6)
    value = loss(x, y)
    rotation, _ = torch.linalg.qr(toy_views(6, 6, views=1)[0])
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert loss(y, x) == pytest.approx(value, rel=1e-12)
    assert loss(x + 5, y - torch.arange(6.0)) == pytest.approx(value, rel=1e-12)
    assert loss(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-12)
    assert loss(x[order], y[order]) == pytest.approx(value, rel=1e-12)
    assert loss(x[order], y) != pytest.approx(value, rel=1e-2)
    assert loss(2 * x, 2 * y) != pytest.approx(value, rel=1e-2)


def test_is_a_polynomial_in_the_scale():
    x, y = toy_views(9, 6)
    k, a, b = 8, x - x.mean(0), y - y.mean(0)
    v, trace_c = (a.T @ a + b.T @ b) / k, 2 * (a * b).sum().item() / k
    square = v.square().sum().item()
    for s in (0.1, 1.0, 7.0):
        assert ssl_ey_loss(s * x, s * y).item() == pytest.approx(-2 * s**2 * trace_c + s**4 * square, rel=1e-12)
    best = (trace_c / square) ** 0.5
    at_best = ssl_ey_loss(best * x, best * y)
    assert at_best < min(ssl_ey_loss(s * best * x, s * best * y) for s in (0.99, 1.01))


def _minimise(loss, parameters):
    optimizer = torch.optim.LBFGS(parameters, max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-12,
                                  tolerance_change=1e-16, max_eval=2000, history_size=50)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    return loss().item()


def _correlated_data(widths=(12, 10)):
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    views = []
    for width in widths:
        mixing = torch.randn(5, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(400, width, generator=generator, dtype=torch.float64)
        views.append(shared @ mixing + 1.2 * noise)
    return views


@pytest.mark.slow
@pytest.mark.parametrize(("k", "value_error", "spectrum_error"), [(3, 1e-9, 1e-5), (10, 1e-9, 1e-5), (14, 1e-7, 1e-3)])
def test_minimum_of_linear_maps_is_the_eigenvalue_sum(k, value_error, spectrum_error):
    """min L = -sum_j max(lambda_j, 0)^2 of canonical correlation analysis, and eig V = lambda (Eckart-Young)."""
    x0, x1 = _correlated_data()
    s00, s01, s11 = _blocks(x0, x1)
    cross = np.block([[np.zeros_like(s00), s01], [s01.T, np.zeros_like(s11)]])
    own = linalg.block_diag(s00, s11)
    eigenvalues = np.sort(linalg.eigh(cross, own, eigvals_only=True))[::-1][:k].clip(0)
    generator = torch.Generator().manual_seed(0)
    u0, u1 = (0.1 * torch.randn(w, k, generator=generator, dtype=torch.float64) for w in (12, 10))
    u0.requires_grad_(), u1.requires_grad_()
    found = _minimise(lambda: ssl_ey_loss(x0 @ u0, x1 @ u1), [u0, u1])
    assert found == pytest.approx(-(eigenvalues**2).sum(), abs=value_error)
    z0, z1 = (x0 @ u0).detach(), (x1 @ u1).detach()
    spectrum = torch.linalg.eigvalsh(torch.cov(z0.T) + torch.cov(z1.T)).flip(0)
    assert np.abs(spectrum.numpy() - eigenvalues).max() < spectrum_error
    # stationary within the span of the inputs: X_c V = Y_c there
    a, b = z0 - z0.mean(0), z1 - z1.mean(0)
    residual = (x0 - x0.mean(0)).T @ (a @ (a.T @ a + b.T @ b) / 399 - b) / 399
    assert residual.abs().max() < max(1e-5, 10 * spectrum_error**2)


@pytest.mark.slow
def test_minimum_of_a_tied_map_is_the_eigenvalue_sum():
    x0, x1 = _correlated_data((10, 10))
    x1 = x1 + 0.8 * x0  # else a tied map finds little in common
    s00, s01, s11 = _blocks(x0, x1)
    eigenvalues = np.sort(linalg.eigh(s01 + s01.T, s00 + s11, eigvals_only=True))[::-1][:4].clip(0)
    both = np.block([[np.zeros_like(s00), s01], [s01.T, np.zeros_like(s11)]])
    untied = np.sort(linalg.eigh(both, linalg.block_diag(s00, s11), eigvals_only=True))[::-1][:4].clip(0)
    u = 0.1 * torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u.requires_grad_()
    found = _minimise(lambda: ssl_ey_loss(x0 @ u, x1 @ u), [u])
    assert found == pytest.approx(-(eigenvalues**2).sum(), abs=1e-9)
    assert found >= -(untied**2).sum() - 1e-9


def _blocks(x0, x1):
    joint = np.cov(torch.cat([x0, x1], 1).numpy().T)
    w = x0.shape[1]
    return joint[:w, :w], joint[:w, w:], joint[w:, w:]


# --- estimators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 3), (6, 4), (5, 13)])
def test_ustat_is_the_mean_over_distinct_quadruples(form, shape):
    x, y = toy_views(*shape)
    quadruples = list(itertools.permutations(range(shape[0]), 4))
    total = 0.0
    for u, v in itertools.product((x, y), repeat=2):
        total += sum(((u[i] - u[j]) @ (v[k] - v[m])).item() ** 2 / 4 for i, j, k, m in quadruples)
    assert _squared_covariance(x, y, form, "ustat") == pytest.approx(total / len(quadruples), rel=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(4, 3), (9, 4), (5, 13)])
def test_split_is_the_trace_of_two_half_batches(form, shape):
    x, y = toy_views(*shape)
    even, odd = (np.cov(x[part::2].numpy().T) + np.cov(y[part::2].numpy().T) for part in (0, 1))
    assert _squared_covariance(x, y, form, "split") == pytest.approx(np.trace(even @ odd), rel=1e-11)


@pytest.mark.slow
def test_split_and_ustat_are_unbiased_and_plugin_is_not():
    width, rows, draws = 20, 32, 1500
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(2 * width, 2 * width, generator=generator, dtype=torch.float64) / 3
    covariance = mixing.T @ mixing
    truth = (covariance[:width, :width] + covariance[width:, width:]).square().sum().item()
    estimates = {estimator: [] for estimator in ESTIMATORS}
    for _ in range(draws):
        both = torch.randn(rows, 2 * width, generator=generator, dtype=torch.float64) @ mixing + 1
        x, y = both[:, :width], both[:, width:]
        for estimator in ESTIMATORS:
            estimates[estimator].append(_squared_covariance(x, y, "auto", estimator))
    mean = {name: np.mean(values) - truth for name, values in estimates.items()}
    error = {name: np.std(values) / draws**0.5 for name, values in estimates.items()}
    # six standard errors: a correct estimator fails once in 5e8 streams of random numbers
    assert abs(mean["split"]) < 6 * error["split"]
    assert abs(mean["ustat"]) < 6 * error["ustat"]
    assert mean["plugin"] > 10 * error["plugin"]
    assert error["ustat"] < error["split"]


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(6, 4), (5, 13)])
def test_gradcheck(form, estimator, shape):
    views = [view.requires_grad_() for view in toy_views(*shape)]
    assert torch.autograd.gradcheck(lambda a, b: ssl_ey_loss(a, b, form=form, estimator=estimator), views)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_analytic_gradient_is_that_of_autograd(form, shape):
    views = [view.requires_grad_() for view in toy_views(*shape)]
    expected = torch.autograd.grad(_autograd_ssl_ey(*views), views)
    found = torch.autograd.grad(3 * ssl_ey_loss(*views, form=form), views)
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("detached", [0, 1])
def test_gradient_of_one_view_only(detached):
    views = toy_views(6, 4)
    free = views[1 - detached].requires_grad_()
    found = torch.autograd.grad(ssl_ey_loss(*views), free)
    torch.testing.assert_close(found, torch.autograd.grad(_autograd_ssl_ey(*views), free), rtol=1e-12, atol=1e-12)


def test_no_gradient_is_made_where_none_is_wanted():
    x, y = toy_views(64, 8)
    needed = 2 * 128 * 8 * 8  # flops of V alone
    with FlopCounterMode(display=False) as counter:
        assert not ssl_ey_loss(x, y).requires_grad
    assert counter.get_total_flops() == needed
    x.requires_grad_()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        assert not ssl_ey_loss(x, y).requires_grad
    assert counter.get_total_flops() == needed


def test_second_derivatives_are_refused():
    x, y = (view.requires_grad_() for view in toy_views(6, 4))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ssl_ey_loss(x, y), x, create_graph=True)


@pytest.mark.parametrize(("rows", "width"), [(64, 16), (16, 64)])
def test_costs_two_products(rows, width):
    """8 N D^2 flops in covariance form, 16 N^2 D in Gram form, and "auto" takes the smaller; nothing grows with D^3."""
    flops = {}
    for form in FORMS:
        views = [view.requires_grad_() for view in toy_views(rows, width)]
        with FlopCounterMode(display=False) as counter:
            ssl_ey_loss(*views, form=form).backward()
        flops[form] = counter.get_total_flops()
    assert flops["covariance"] == 8 * rows * width**2
    assert flops["gram"] == 16 * rows**2 * width
    assert flops["auto"] == min(flops.values())


# --- ranks ----------------------------------------------------------------------------------------------------------


def _plugin_step(comm, model, x0, x1):
    return ssl_ey_loss(model(x0), model(x1), comm=comm)


def _gram_step(comm, model, x0, x1):
    return ssl_ey_loss(model(x0), model(x1), comm=comm, form="gram")


def _covariance_step(comm, model, x0, x1):
    return ssl_ey_loss(model(x0), model(x1), comm=comm, form="covariance")


def _split_step(comm, model, x0, x1):
    return ssl_ey_loss(model(x0), model(x1), comm=comm, estimator="split")


def _ustat_step(comm, model, x0, x1):
    return ssl_ey_loss(model(x0), model(x1), comm=comm, estimator="ustat")


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1)])
@pytest.mark.parametrize("step", [_plugin_step, _gram_step, _covariance_step, _split_step, _ustat_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5), counts, build=build)


def _traffic(comm, x, y):
    """Numbers of floats sent in forward, and how often anything was sent in backward."""
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    x = x.clone().requires_grad_()
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = ssl_ey_loss(x, y, comm=comm)
        forward = sent.copy()
        loss.backward()
    return forward, len(sent) - len(forward)


@pytest.mark.ddp
@pytest.mark.parametrize("width", [4, 50])
def test_sends_the_smaller_thing_and_nothing_in_backward(ranks, width):
    x, y = toy_views(20, width)
    for forward, backward in ranks.run(_traffic, list(zip(x.split(10), y.split(10), strict=True))):
        assert backward == 0
        assert max(forward) == min(width * width, 2 * 10 * width)
        assert sum(forward) <= max(forward) + 2 * width + 8


def _error(comm, x, y, form):
    try:
        ssl_ey_loss(x, y, comm=comm, form=form)
    except ValueError as error:
        return str(error)


@pytest.mark.ddp
@pytest.mark.parametrize("form", FORMS)
def test_one_row_over_all_ranks_is_refused(ranks, form):
    one, none = torch.ones(1, 4), torch.ones(0, 4)
    for message in ranks.run(_error, [(one, one, form), (none, none, form)]):
        assert message == "the SSL-EY loss needs at least 2 rows over all processes, got 1"


# --- numerics -------------------------------------------------------------------------------------------------------


def test_too_few_rows_are_refused():
    for form in FORMS:
        with pytest.raises(ValueError, match="at least 2 rows over all processes, got 1"):
            ssl_ey_loss(torch.ones(1, 3), torch.ones(1, 3), form=form)
    for estimator in ("split", "ustat"):
        with pytest.raises(ValueError, match="at least 4 rows"):
            ssl_ey_loss(torch.ones(3, 3), torch.ones(3, 3), estimator=estimator)


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"z1 must have the shape of z0, \(4, 3\), got \(4, 2\)"):
        ssl_ey_loss(z, z[:, :2])
    with pytest.raises(ValueError, match=r"z0 must be a matrix \[N, D\], got shape \(3,\)"):
        ssl_ey_loss(z[0], z[0])
    with pytest.raises(ValueError, match="form must be one of auto, covariance, gram, got 'dual'"):
        ssl_ey_loss(z, z, form="dual")
    with pytest.raises(ValueError, match="estimator must be one of plugin, split, ustat, got 'best'"):
        SSLEYLoss(estimator="best")


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, estimator, device):
    if shape[0] < 4 and estimator != "plugin":
        estimator = "plugin"  # the others need four rows
    views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
    for form in FORMS:
        loss = ssl_ey_loss(*views, form=form, estimator=estimator)
        assert loss.dtype == torch.float32 and loss.isfinite()
        gradients = torch.autograd.grad(loss, views)
        if kind == "large" and dtype == torch.float16:
            # the gradient itself may exceed 65504; it must be right before it is rounded to the input's dtype
            exact = [view.detach().float().requires_grad_() for view in views]
            gradients = torch.autograd.grad(ssl_ey_loss(*exact, form=form, estimator=estimator), exact)
        assert all(gradient.isfinite().all() for gradient in gradients)
        if kind in ("constant", "zero", "duplicated"):  # a saddle: no variance, no direction
            assert loss.abs() < 1e-6
            assert all(gradient.abs().max() < 1e-3 for gradient in gradients)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, dtype):
    """At standard deviation 10 and N = 2048, a half-precision X^T X would overflow before it is divided by N - 1."""
    x, y = (10 * view.float().to(device, dtype) for view in toy_views(2048, 8))
    with torch.autocast(device, dtype=dtype):
        loss = ssl_ey_loss(x, y)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_ssl_ey(x.float().cpu(), y.float().cpu()), rel=1e-5)


@pytest.mark.parametrize("device", devices())
def test_gradients_are_finite_at_the_first_scale_of_a_grad_scaler(device):
    """The seed of -2 tr C is 2 * 65536: cast to half precision it would be infinite, and the step silently skipped."""
    views = [view.to(device, torch.float16).requires_grad_() for view in difficult_views("normal", 2048, 16)]
    with torch.autocast(device, dtype=torch.float16):
        loss = ssl_ey_loss(*views)
    (65536 * loss).backward()
    for view in views:
        assert view.grad.isfinite().all()
        assert view.grad.abs().max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(8, 4), (8, 32)])
def test_compiles_to_one_graph(shape, estimator):
    views = [view.float().requires_grad_() for view in toy_views(*shape)]
    # code is generated once; the other cases test that there is one graph
    backend = "inductor" if (shape, estimator) == ((8, 4), "plugin") else "aot_eager"
    compiled = torch.compile(ssl_ey_loss, fullgraph=True, backend=backend)
    expected = ssl_ey_loss(*views, estimator=estimator)
    found = compiled(*views, estimator=estimator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, views), torch.autograd.grad(expected, views), rtol=1e-4, atol=1e-4
    )
