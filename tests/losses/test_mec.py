"""MEC: known values, slow reference, limits, gradients, ranks, dtypes, divergence, warm-up."""

import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.losses import MECLoss, mec_loss, mec_terms, mec_warmup
from plugins.losses.log_series import SeriesWatch, log_series
from plugins.testing import DIFFICULT, assert_joined, devices, difficult_views, toy_mlp, toy_views, waves

FORMS = ("auto", "covariance", "gram")
SHAPES = [(6, 4), (5, 7), (9, 18), (40, 3)]


def _reference_mec(z0, z1, p0, p1, lambda_inv, order=4):
    """The N x N matrix of cosines over lambda_inv, power by power."""
    total = 0.0
    for z, p in ((z0, p1), (z1, p0)):
        z, p = (np.asarray(each, dtype=np.float64) for each in (z, p))
        n = len(z)
        m = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                m[i, j] = p[i] @ z[j] / np.sqrt((p[i] @ p[i]) * (z[j] @ z[j])) / lambda_inv
        series = sum((-1) ** (k + 1) / k * np.trace(np.linalg.matrix_power(m, k)) for k in range(1, order + 1))
        total -= lambda_inv / n * series / 2
    return total


def _as_executed(z0, z1, p0, p1, eps_d, order=4):
    """The formula as published, left to autograd."""
    n, total = len(z0), 0
    for z, p in ((z0, p1), (z1, p0)):
        m = (p / p.norm(dim=1, keepdim=True)).detach() @ (z / z.norm(dim=1, keepdim=True)).T / (n * eps_d)
        power, series = torch.eye(n, dtype=z.dtype), 0
        for k in range(1, order + 1):
            power = power @ m
            series = series + (-1) ** (k + 1) / k * power
        total = total - eps_d * torch.trace(series) / 2
    return total


def _batch(rows, width):
    return toy_views(rows, width, views=4)


def _free(rows, width):
    z0, z1, p0, p1 = _batch(rows, width)
    return [z0.requires_grad_(), z1.requires_grad_()], [p0, p1]


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("shape", "value"), [((6, 4), 2.340540995628415e-4), ((5, 7), -8.391470720692441e-3)])
def test_golden_values(form, shape, value):
    # computed apart from this repository, in numpy, from the formula with matrix powers
    views = [waves(scale, *shape) for scale in (1.0, 1.1, 1.3, 0.7)]
    loss = mec_loss(*views, eps_d=0.25, form=form)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    assert loss.dtype == torch.float64 and loss.shape == ()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_slow_reference(shape, order, form):
    views = _batch(*shape)
    expected = _reference_mec(*views, lambda_inv=shape[0] * 0.3, order=order)
    assert mec_loss(*views, eps_d=0.3, order=order, form=form).item() == pytest.approx(expected, rel=1e-12)
    single = [view.float() for view in views]
    assert mec_loss(*single, eps_d=0.3, order=order, form=form).item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    tensor = torch.tensor(0.3, dtype=torch.float64)
    assert mec_loss(*views, eps_d=tensor, order=order, form=form).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), width=st.integers(1, 30), exponent=st.integers(-8, 8), eps_d=st.floats(0.05, 3))
def test_covariance_and_gram_forms_agree_at_any_shape_and_scale(rows, width, exponent, eps_d):
    views = [10.0**exponent * view for view in _batch(rows, width)]
    expected = _reference_mec(*views, lambda_inv=rows * eps_d)
    scale = sum(eps_d ** (1 - k) / k for k in range(1, 5))  # of parts that may cancel
    for form in FORMS:
        assert mec_loss(*views, eps_d=eps_d, form=form).item() == pytest.approx(expected, rel=1e-12, abs=1e-12 * scale)


def test_orthonormal_rows():
    """N equal eigenvalues 1 / (N eps_d), the more entropy the more modes: -N eps_d log_4(1 + 1 / (N eps_d))."""
    for n in (2, 8):
        z = torch.eye(8, dtype=torch.float64)[:n]
        x = 1 / (n * 0.5)
        expected = -(x - x**2 / 2 + x**3 / 3 - x**4 / 4) / x
        terms = mec_terms(z, z, z, z, eps_d=0.5)
        assert terms.loss.item() == pytest.approx(expected)
        assert (terms.similarity.item(), terms.effective_rank.item()) == pytest.approx((1, n))
        assert terms.radius.item() == pytest.approx(x)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_tends_to_minus_the_mean_cosine(shape):
    views = _batch(*shape)
    cosines = [torch.cosine_similarity(z, p).mean().item() for z, p in ((views[0], views[3]), (views[1], views[2]))]
    for form in FORMS:
        terms = mec_terms(*views, eps_d=1e6, form=form)
        assert terms.loss.item() == pytest.approx(-np.mean(cosines), abs=1e-6)
        assert terms.similarity.item() == pytest.approx(np.mean(cosines))
    assert mec_loss(*views, eps_d=0.1, order=1).item() == pytest.approx(-np.mean(cosines))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_terms_are_what_they_say(shape, form):
    free, targets = _free(*shape)
    terms = mec_terms(*free, *targets, eps_d=0.2, form=form)
    assert [term.requires_grad for term in terms] == [True, False, False, False]
    assert torch.equal(terms.loss, mec_loss(*free, *targets, eps_d=0.2, form=form))
    unit = [(z / z.norm(dim=1, keepdim=True)).detach().numpy() for z in free]
    squares = [np.square(u.T @ u / len(u)).sum() for u in unit]
    assert terms.effective_rank.item() == pytest.approx(1 / np.mean(squares))
    others = [(p / p.norm(dim=1, keepdim=True)).numpy() for p in reversed(targets)]
    radii = [np.abs(np.linalg.eigvals(p.T @ z / len(z))).max() / 0.2 for z, p in zip(unit, others, strict=True)]
    assert terms.radius.item() == pytest.approx(max(radii), rel=1e-2)


def test_module_is_the_function():
    views = _batch(9, 6)
    module = MECLoss(eps_d=2.0, order=3, form="gram")
    assert torch.equal(module(*views), mec_loss(*views, eps_d=2.0, order=3, form="gram"))
    assert torch.equal(module(*views, warmup=2.0), mec_loss(*views, eps_d=4.0, order=3, form="gram"))
    assert "eps_d=2.0, order=3" in repr(module)


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_invariances(shape):
    z0, z1, p0, p1 = views = _batch(*shape)
    loss = mec_loss(*views, eps_d=0.5).item()
    generator = torch.Generator().manual_seed(2)
    scales = torch.rand(4, shape[0], 1, generator=generator, dtype=torch.float64) * 9 + 0.1
    rotation = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(shape[0], generator=generator)
    assert mec_loss(*(s * v for s, v in zip(scales, views, strict=True)), eps_d=0.5).item() == pytest.approx(loss)
    assert mec_loss(*(view @ rotation for view in views), eps_d=0.5).item() == pytest.approx(loss)
    assert mec_loss(*(view[order] for view in views), eps_d=0.5).item() == pytest.approx(loss)
    assert mec_loss(p1, p0, z1, z0, eps_d=0.5).item() == pytest.approx(loss)
    assert mec_loss(z0[order], z1, p0, p1, eps_d=0.5).item() != pytest.approx(loss, rel=1e-3)


def test_links_to_matrix_ssl_by_a_shift_of_the_identity():
    """log det(I_N + p z^T / lambda_inv) = log det(eps_d I_D + C) - D log eps_d, where the series converges."""
    z, _, p, _ = _batch(9, 6)
    unit = [(v / v.norm(dim=1, keepdim=True)).numpy() for v in (p, z)]
    c = unit[0].T @ unit[1] / 9
    expected = -2 * (np.linalg.slogdet(2 * np.eye(6) + c)[1] - 6 * np.log(2))
    assert mec_loss(z, z, p, p, eps_d=2.0, order=40).item() == pytest.approx(expected, rel=1e-10)


def test_collapse_diverges():
    """Equal rows, N = 64, lambda_inv = 2: one eigenvalue 32. The loss is large at order 4, small with the logarithm."""
    rows = torch.ones(64, 8, dtype=torch.float64)
    terms = mec_terms(*[rows] * 4, eps_d=2 / 64)
    assert terms.loss.item() == pytest.approx(-2 / 64 * (32 - 32**2 / 2 + 32**3 / 3 - 32**4 / 4))
    assert terms.loss.item() > 7800
    assert -2 / 64 * np.log1p(32) == pytest.approx(-0.11, abs=5e-3)
    assert mec_loss(*[rows] * 4, eps_d=2 / 64, order=5).item() < -2e5  # an odd order is far below 0
    assert (terms.radius.item(), terms.effective_rank.item()) == pytest.approx((32, 1))


def test_a_diverging_series_is_reported_once_and_without_waiting_at_every_step():
    rows = [torch.ones(16, 8)] * 4
    module = MECLoss(eps_d=1 / 32)
    with pytest.warns(RuntimeWarning, match="the series of the MEC loss diverges: spectral radius 32, above 1; use a"):
        module(*rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(101):
            module(*rows)
        MECLoss(eps_d=1 / 32)(*rows, warmup=40.0)
        MECLoss(eps_d=1 / 32).eval()(*rows)
    looked = []
    watch = SeriesWatch("it", "do that", every=10)

    def radius():
        looked.append(watch.calls)
        return torch.tensor(0.99)

    for _ in range(25):
        watch(radius)
    assert looked == [1, 11, 21]
    with pytest.raises(ValueError, match="every must be"):
        SeriesWatch("it", "do that", every=0)


def _looks(*radii):
    """Return the warnings of a watch for each of several radii."""
    watch, said = SeriesWatch("it", "do that", every=1), []
    for radius in radii:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch(lambda radius=radius: torch.tensor(radius))
        said.append([str(warning.message) for warning in caught])
    return said


def test_a_radius_that_is_not_a_number_is_outside():
    (message,), *rest = _looks(float("nan"), float("nan"))
    assert message == "the series of it diverges: spectral radius nan, not a number; do that"
    assert rest == [[]]
    assert [len(said) for said in _looks(float("inf"), float("nan"))] == [1, 0]


def test_it_warns_again_after_a_radius_that_was_back_inside():
    assert [len(said) for said in _looks(2.0, 3.0, 0.9, 0.8, 1.5, 1.0, float("nan"))] == [1, 0, 0, 0, 1, 0, 1]


def test_warmup_is_that_of_the_published_code():
    """lambda_inv of N = 1024, D = 2048: 256 at first, 32 at the last of the steps and after."""
    steps, lambda_inv = 10 * 1251, 1024 * 64 / 2048
    found = [lambda_inv * mec_warmup(step, steps) for step in range(steps + 5)]
    np.testing.assert_allclose(found[:steps], np.linspace(256, 32, steps), rtol=1e-12)
    assert found[steps - 1 :] == [32.0] * 6
    assert mec_warmup(0, 0) == mec_warmup(0, 1) == 1
    for arguments in ((-1, 5), (0, -1), (0, 5, 0.5)):
        with pytest.raises(ValueError, match="must be in"):
            mec_warmup(*arguments)


def test_series_coefficients():
    assert log_series(4) == (0, pytest.approx([1, -1 / 2, 1 / 3, -1 / 4]))
    for order in (4.0, 1.5, float("inf"), "1", True):
        with pytest.raises(ValueError, match=f"the order of a series must be an integer, got {order!r}"):
            log_series(order)
    x, mu = 0.3, 0.6
    for order in (1, 4, 5):
        zero, rest = log_series(order, mu)
        expected = sum((-1) ** (k + 1) / k * (x + mu - 1) ** k for k in range(1, order + 1))
        assert zero + sum(a * x**j for j, a in enumerate(rest, 1)) == pytest.approx(expected, rel=1e-12)


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["covariance", "gram"])
@pytest.mark.parametrize("order", [1, 4])
@pytest.mark.parametrize("shape", [(6, 4), (5, 13)])
def test_gradcheck(shape, order, form):
    free, targets = _free(*shape)
    assert torch.autograd.gradcheck(lambda a, b: mec_loss(a, b, *targets, eps_d=0.6, order=order, form=form), free)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("eps_d", "order"), [(0.1, 4), (1.0, 5), (0.5, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_that_of_the_formula_as_executed(shape, eps_d, order, form):
    free, targets = _free(*shape)
    expected = torch.autograd.grad(_as_executed(*free, *targets, eps_d, order), free)
    found = torch.autograd.grad(3 * mec_loss(*free, *targets, eps_d=eps_d, order=order, form=form), free)
    scale = max(1, eps_d ** (1 - order))
    torch.testing.assert_close(found, tuple(3 * g for g in expected), rtol=1e-11, atol=1e-13 * scale)


def test_no_gradient_reaches_the_targets():
    free, targets = _free(6, 4)
    targets = [target.requires_grad_() for target in targets]
    loss = mec_loss(*free, *targets, eps_d=0.5)
    assert torch.autograd.grad(loss, targets, allow_unused=True) == (None, None)
    assert not mec_loss(*(view.detach() for view in free), *targets, eps_d=0.5).requires_grad


# --- ranks ----------------------------------------------------------------------------------------------------------


def _step(comm, model, x0, x1, form="auto"):
    with torch.no_grad():
        targets = [model(x.flip(1)) for x in (x0, x1)]
    return mec_loss(model(x0), model(x1), *targets, eps_d=0.4, comm=comm, form=form)


def _gram_step(comm, model, x0, x1):
    return _step(comm, model, x0, x1, "gram")


def _covariance_step(comm, model, x0, x1):
    return _step(comm, model, x0, x1, "covariance")


def _wide():
    return toy_mlp(5, 40)


@pytest.mark.ddp
@pytest.mark.parametrize("build", [None, _wide])
@pytest.mark.parametrize("counts", [(5, 5), (8, 3), (4, 4, 4), (2, 9, 1)])
@pytest.mark.parametrize("step", [_step, _gram_step, _covariance_step])
def test_ranks_equal_the_joined_batch(ranks, step, counts, build):
    assert_joined(ranks, step, toy_views(sum(counts), 5), counts, build=build)


def _traffic(comm, *views):
    """Numbers of floats sent in forward, how often anything was sent in backward, and the terms in each form."""
    sent = []

    def recorded(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel())
            return function(*args, **kwargs)

        return call

    free = views[0].clone().requires_grad_()
    with (
        mock.patch.object(dist, "all_reduce", recorded(dist.all_reduce, 0)),
        mock.patch.object(dist, "all_gather", recorded(dist.all_gather, 1)),
    ):
        loss = mec_loss(free, *views[1:], comm=comm, eps_d=0.5)
        forward = sent.copy()
        loss.backward()
    terms = [mec_terms(*views, comm=comm, eps_d=0.5, form=form) for form in ("covariance", "gram")]
    return forward, len(sent) - len(forward), terms


@pytest.mark.ddp
@pytest.mark.parametrize("width", [4, 30, 50])
def test_sends_the_smaller_thing_and_nothing_in_backward(ranks, width):
    views = _batch(20, width)
    parts = list(zip(*(view.split(10) for view in views), strict=True))
    for forward, backward, of_form in ranks.run(_traffic, parts):
        assert backward == 0
        statistics, rows = 2 * width**2, 4 * 20 * width
        assert 0 <= sum(forward) - (statistics if statistics <= rows else rows // 2) <= 8  # each gives its half of rows
        for terms in of_form:
            exact = mec_terms(*views, eps_d=0.5)
            torch.testing.assert_close(terms[:3], exact[:3], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(terms.radius, exact.radius, rtol=1e-2, atol=0)


# --- numerics -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
    z = torch.ones(4, 3)
    for arguments, options, message in [
        ([z, z, z, z[:, :2]], {}, r"target1 must have the shape of p0, \(4, 3\), got \(4, 2\)"),
        ([z[:0]] * 4, {}, "the MEC loss needs at least 1 rows over all processes, got 0"),
        ([z] * 4, {"form": "dual"}, "form must be one of auto, covariance, gram, got 'dual'"),
        ([z] * 4, {"order": 0}, r"order must be in \[1, inf\), got 0"),
        ([z] * 4, {"order": 4.0}, "order must be an integer, got 4.0"),
        ([z] * 4, {"eps_d": "a"}, "eps_d must be a number, got 'a'"),
        ([z] * 4, {"eps_d": float("nan")}, r"eps_d must be in \[1e-06, inf\), got nan"),
        ([z] * 4, {"eps_d": 0.0}, r"eps_d must be in \[1e-06, inf\), got 0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            mec_loss(*arguments, **{"eps_d": 0.5, **options})
        if arguments[0] is z and options:
            with pytest.raises(ValueError, match=message):
                MECLoss(**{"eps_d": 0.5, **options})


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("shape", [(2, 5), (64, 16), (16, 64)])
def test_difficult_batches_are_finite(shape, kind, dtype, device):
    free = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
    targets = [view.to(device, dtype) for view in difficult_views(kind, *shape, seed=1)]
    for form in ("covariance", "gram"):
        terms = mec_terms(*free, *targets, eps_d=1 / 32, form=form)
        assert terms.loss.dtype == torch.float32 and all(term.isfinite() for term in terms)
        assert 0 <= terms.effective_rank <= min(shape) + 1e-3
        gradients = torch.autograd.grad(terms.loss, free)
        if dtype == torch.float16 and kind == "small":
            # the gradient grows as one over the length: it must be right before it is rounded to the input's dtype
            exact = [view.detach().float().requires_grad_() for view in free]
            gradients = torch.autograd.grad(mec_loss(*exact, *targets, eps_d=1 / 32, form=form), exact)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_float32(device, dtype):
    views = [view.float().to(device, dtype) for view in _batch(64, 32)]
    with torch.autocast(device, dtype=dtype):
        loss = mec_loss(*views, eps_d=1 / 32)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_reference_mec(*(v.double().cpu() for v in views), 2), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 4), (8, 32)])
def test_compiles_to_one_graph_for_all_of_the_warmup(shape):
    free, targets = _free(*shape)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mec_loss, fullgraph=True, backend=backend)
    for eps_d in (torch.tensor(2.0), torch.tensor(1.5), torch.tensor(1.25)):
        expected, found = mec_loss(*free, *targets, eps_d=eps_d), compiled(*free, *targets, eps_d=eps_d)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, free), torch.autograd.grad(expected, free))
    assert len(graphs) == 1
    module = MECLoss(eps_d=0.5)
    aot = torch.compile(module, fullgraph=True, backend="aot_eager")(*free, *targets)
    torch.testing.assert_close(aot, mec_loss(*free, *targets, eps_d=0.5))
