"""The closed-form predictor: known values, a slow float64 reference, the published claims, and the forks' mistakes."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from plugins.distributed import LOCAL
from plugins.linalg import eigh
from plugins.predictors import ClosedFormPredictor, RunningMoment

SETTINGS = [(0.5, 0.0), (1.0, 0.25), (2.0, 0.1)]  # DirectPred, DirectCopy, and a power that the fork special-cased
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def require(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _reference_moment(batches, rho):
    total = 0.0
    for z in batches:
        z = z.double().numpy()
        total = rho * total + (1 - rho) * sum(np.outer(row, row) for row in z) / len(z)
    return total


def _reference_weight(moment, alpha, eps, normalize=True):
    values, vectors = np.linalg.eigh(np.asarray(moment, dtype=np.float64))
    values = values.clip(min=0)
    spectrum = (values / values.max() if normalize else values) + eps
    return sum(s**alpha * np.outer(u, u) for s, u in zip(spectrum, vectors.T, strict=True))


def byol_loss(p, target, metric):
    if metric == "cosine":
        return 2 - 2 * F.cosine_similarity(p, target.detach()).mean()
    return (p - target.detach()).square().sum(1).mean()


def relative_error(got, wanted):
    wanted = torch.as_tensor(wanted)
    return float((got.double() - wanted).norm() / wanted.norm())


# Values ---------------------------------------------------------------------------------------------------------------


def test_known_values():
    """Zᵀ Z / N = diag(2, ½), so that C = ½ diag(2, ½), W = diag(1, ½) at α = ½, diag(1.25, ½) at α = 1, ε = ¼."""
    z = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    for alpha, eps, wanted in [(0.5, 0.0, (1.0, 0.5)), (1.0, 0.25, (1.25, 0.5)), (2.0, 0.0, (1.0, 0.0625))]:
        predictor = ClosedFormPredictor(2, alpha=alpha, eps=eps, rho=0.5)
        predictor.update(z)
        torch.testing.assert_close(predictor.C, torch.diag(torch.tensor([1.0, 0.25])))
        torch.testing.assert_close(predictor.W, torch.diag(torch.tensor(wanted)))
        torch.testing.assert_close(predictor.eigenvalues, torch.tensor([1.0, 0.25]))
        torch.testing.assert_close(predictor(z), z * torch.tensor(wanted))


@pytest.mark.parametrize(("alpha", "eps"), SETTINGS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_slow_reference(alpha, eps, normalize, dtype, tolerance):
    predictor = ClosedFormPredictor(8, alpha=alpha, eps=eps, rho=0.9, normalize=normalize).to(dtype)
    batches = [torch.randn(32, 8, dtype=dtype) @ torch.randn(8, 8, dtype=dtype) for _ in range(3)]
    for z in batches:
        predictor.update(z)
    moment = _reference_moment(batches, 0.9)
    weight = _reference_weight(moment, alpha, eps, normalize)
    assert predictor.C.dtype == predictor.W.dtype == dtype
    assert relative_error(predictor.C, moment) < tolerance
    assert relative_error(predictor.W, weight) < tolerance
    assert relative_error(predictor(batches[0]), batches[0].double().numpy() @ weight) < tolerance
    assert relative_error(predictor.eigenvalues, np.linalg.eigvalsh(moment)[::-1].copy()) < tolerance


def test_centred_moment_is_that_of_the_rows_seen():
    """Bias-corrected means: with stationary data C − μμᵀ is (1 − ρ^k) times the covariance at every k."""
    predictor = ClosedFormPredictor(4, rho=0.8, center=True).double()
    z = torch.randn(64, 4, dtype=torch.float64) + torch.tensor([5.0, 0.0, -3.0, 0.0])
    for k in range(1, 4):
        predictor.update(z)
        torch.testing.assert_close(predictor.covariance(), (1 - 0.8**k) * torch.cov(z.T, correction=0))
    weight = _reference_weight(np.cov(z.numpy().T, ddof=0), 0.5, 0.0)
    torch.testing.assert_close(predictor.W, torch.as_tensor(weight))
    assert relative_error(ClosedFormPredictor(4).W.double(), weight) > 0.1


# P2: a constant, symmetric, bounded, scale-free, equivariant ----------------------------------------------------------


@pytest.mark.parametrize(("alpha", "eps"), SETTINGS)
@pytest.mark.parametrize("mode", ["sequential", "pooled"])
def test_p2_no_gradient_reaches_the_state(alpha, eps, mode):
    predictor = ClosedFormPredictor(6, alpha=alpha, eps=eps, mode=mode)
    views = [torch.randn(16, 6, requires_grad=True) for _ in range(2)]
    # backward through both views: the update of view 1 must not spoil what view 0 saved
    torch.cat(predictor.predict(views)).sum().backward()
    assert not list(predictor.parameters())
    for buffer in predictor.buffers():
        assert not buffer.requires_grad
        assert buffer.grad_fn is None
    if mode == "pooled":
        torch.testing.assert_close(views[0].grad, torch.ones(16, 6) @ predictor.W)
    torch.testing.assert_close(views[1].grad, torch.ones(16, 6) @ predictor.W)


@pytest.mark.parametrize(("alpha", "eps"), SETTINGS)
def test_p2_weight_is_symmetric_with_bounded_spectrum(alpha, eps):
    predictor = ClosedFormPredictor(24, alpha=alpha, eps=eps)
    predictor.update(torch.randn(8, 24))  # rank-deficient
    assert torch.equal(predictor.C, predictor.C.T)
    assert torch.equal(predictor.W, predictor.W.T)
    values = torch.linalg.eigvalsh(predictor.W.double())
    assert values.min() >= eps**alpha - 1e-5
    assert values.max() == pytest.approx((1 + eps) ** alpha, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-4, 1e3), seed=st.integers(0, 99), setting=st.sampled_from(SETTINGS))
def test_p2_weight_ignores_scale_and_turns_with_the_data(scale, seed, setting):
    alpha, eps = setting
    generator = torch.Generator().manual_seed(seed)
    z, y = torch.randn(2, 64, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q

    def fed(rows):
        predictor = ClosedFormPredictor(8, alpha=alpha, eps=eps).double()
        predictor.update(rows)
        return predictor

    plain, turned = fed(z), fed(z @ rotation)
    torch.testing.assert_close(fed(scale * z).W, plain.W, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(turned.W, rotation.T @ plain.W @ rotation, rtol=1e-5, atol=1e-8)
    for metric in ("cosine", "euclidean"):
        loss = byol_loss(plain(z), y, metric)
        torch.testing.assert_close(byol_loss(turned(z @ rotation), y @ rotation, metric), loss, rtol=1e-5, atol=0)


def test_isotropic_moment_makes_no_predictor():
    """W = I where all eigenvalues are equal (normalised, ε = 0)."""
    predictor = ClosedFormPredictor(4)
    predictor.update(3 * torch.eye(4))
    torch.testing.assert_close(predictor.W, torch.eye(4))


def test_spectrum_of_a_rank_deficient_moment_is_not_negative():
    moment = RunningMoment(3)
    moment.C.copy_(torch.diag(torch.tensor([1.0, 0.0, -1e-9])))  # as rounding may leave it
    assert moment.spectrum().tolist() == [1, 0, 0]


# P3 and T1: degenerate spectra ----------------------------------------------------------------------------------------


def degenerate_rows(kind):
    """Rows of width 256 whose second moment has rank 32, or is the identity up to symmetric noise of 1e-6."""
    if kind == "rank-deficient":
        return torch.randn(32, 256)
    noise = 1e-6 * torch.randn(256, 256, dtype=torch.float64)
    root = torch.linalg.cholesky(torch.eye(256, dtype=torch.float64) + noise + noise.T)
    return math.sqrt(256) * root.T.float()


@pytest.mark.parametrize("kind", ["rank-deficient", "isotropic"])
def test_p3_directcopy_is_exact_without_eigenvectors(kind, monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    predictor = ClosedFormPredictor(256, alpha=1.0, eps=0.25, rho=0.0)
    predictor.update(degenerate_rows(kind))
    largest = np.linalg.eigvalsh(predictor.C.double().numpy()).max()
    wanted = predictor.C.double() / largest + 0.25 * torch.eye(256)
    assert relative_error(predictor.W, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["rank-deficient", "isotropic"])
def test_t1_symmetric_solver_survives_degenerate_spectra(kind):
    """A general solver's eigenvectors need not be orthogonal there: W made of such ones is wrong by its own size."""
    z = degenerate_rows(kind)
    moment = z.T @ z / len(z)
    wanted = torch.as_tensor(_reference_weight(moment, 1.0, 0.25))

    values, vectors = eigh(moment)
    rebuilt = (vectors * (values.clamp(min=0) / values[-1] + 0.25)) @ vectors.T
    assert relative_error(rebuilt, wanted) < 1e-5
    assert relative_error(vectors.T @ vectors, torch.eye(256).double()) < 1e-5

    # unit vectors of an eigenspace are eigenvectors, orthogonal or not
    equal = 256 if kind == "isotropic" else 256 - 32
    sides = vectors.clone()
    sides[:, :equal] = F.normalize(vectors[:, :equal] @ torch.randn(equal, equal), dim=0)
    assert (moment @ sides - values * sides).norm(dim=0).max() < 1e-4 * values[-1]
    forked = (sides * (values.clamp(min=0) / values[-1] + 0.25)) @ sides.T
    assert relative_error(forked, wanted) > 0.3


def test_t1_small_eigenvalues_survive_alpha_one_half():
    z = torch.randn(512, 64) * torch.logspace(0, -3, 64)  # eigenvalues over six decades
    predictor = ClosedFormPredictor(64, rho=0.0)
    predictor.update(z)
    moment = _reference_moment([z], 0.0)
    wanted, values = _reference_weight(moment, 0.5, 0.0), np.linalg.eigvalsh(moment)
    # |A^½ - B^½| <= |A - B| / sqrt(λmin(A)), and rounding makes |A - B| <= D eps λmax; in half precision 0.01 λmax
    bound = 64 * torch.finfo(torch.float32).eps / math.sqrt(values.min() / values.max()) / np.linalg.norm(wanted)
    assert relative_error(predictor.W, wanted) < bound < 0.01


def test_falls_back_to_float64_where_the_solver_fails(monkeypatch):
    solve, values_only = torch.linalg.eigh, torch.linalg.eigvalsh

    def failing(original):
        def wrapper(matrix):
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("failed to converge")
            return original(matrix)

        return wrapper

    z = torch.randn(32, 8)
    for alpha in (0.5, 1.0):
        predictor, fallback = ClosedFormPredictor(8, alpha=alpha), ClosedFormPredictor(8, alpha=alpha)
        predictor.update(z)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", failing(solve))
            patch.setattr(torch.linalg, "eigvalsh", failing(values_only))
            fallback.update(z)
        torch.testing.assert_close(fallback.W, predictor.W, rtol=1e-4, atol=1e-5)
        assert fallback.W.dtype == torch.float32


# P4 and T5: the moving average ----------------------------------------------------------------------------------------


def test_p4_moving_average_from_zero():
    rho, z = 0.7, torch.randn(32, 5, dtype=torch.float64)
    second = z.T @ z / 32
    predictor = ClosedFormPredictor(5, rho=rho).double()
    weights = []
    for step in range(1, 4):
        predictor.predict([z, z])
        torch.testing.assert_close(predictor.C, (1 - rho ** (2 * step)) * second)
        assert int(predictor.steps) == 2 * step
        weights.append(predictor.W.clone())
    for weight in weights:  # the zero at the start cancels when normalised
        torch.testing.assert_close(weight, weights[0])


def test_t5_rho_is_per_view_and_order_matters():
    """Sequential: W of view 0 has not seen view 1. Pooled with ρ² keeps as much of the past and shares W."""
    rho = 0.6
    first, second = torch.randn(2, 32, 4, dtype=torch.float64) * torch.tensor([[[1.0]], [[3.0]]])
    sequential = ClosedFormPredictor(4, alpha=1.0, normalize=False, rho=rho).double()
    pooled = ClosedFormPredictor(4, alpha=1.0, normalize=False, rho=rho**2, mode="pooled").double()
    moments = [z.T @ z / 32 for z in (first, second)]

    predictions = sequential.predict([first, second])
    after_first = (1 - rho) * moments[0]
    after_both = rho * after_first + (1 - rho) * moments[1]  # the new mass is split ρ : 1
    torch.testing.assert_close(predictions[0], first @ after_first)
    torch.testing.assert_close(predictions[1], second @ after_both)

    predictions = pooled.predict([first, second])
    shared = (1 - rho**2) * (moments[0] + moments[1]) / 2
    torch.testing.assert_close(pooled.C, shared)
    torch.testing.assert_close(predictions, [first @ shared, second @ shared])
    assert (int(sequential.steps), int(pooled.steps)) == (2, 1)


def test_weight_is_refreshed_at_every_kth_update():
    frequent, rare = ClosedFormPredictor(4, rho=0.5), ClosedFormPredictor(4, rho=0.5, every=3)
    fresh = []
    for _ in range(7):
        z = torch.randn(16, 4)
        frequent.update(z)
        rare.update(z)
        fresh.append(torch.equal(frequent.W, rare.W))
    assert fresh == [True, False, False, True, False, False, True]
    assert torch.equal(frequent.C, rare.C)


def test_rare_refresh_hardly_changes_predictions():
    """Between two refreshes at most 1 - ρ^9 of C is replaced, and of W = C^½ in relative terms no more than of C."""
    frequent, rare = ClosedFormPredictor(32), ClosedFormPredictor(32, every=10)
    scale = torch.logspace(0, -1, 32)
    for _ in range(300):
        z = torch.randn(64, 32) * scale
        frequent.update(z)
        rare.update(z)
    assert 0 < relative_error(rare.W, frequent.W.double()) < 1 - 0.998**9


# P5 and T2: evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sequential", "pooled"])
def test_p5_t2_evaluation_changes_nothing(mode):
    predictor = ClosedFormPredictor(4, mode=mode, center=True)
    predictor.predict([torch.randn(8, 4)])
    before = copy.deepcopy(predictor.state_dict())
    predictor.eval()
    z = torch.randn(8, 4)
    (p,) = predictor.predict([z])
    torch.testing.assert_close(p, z @ before["W"])
    for name, value in predictor.state_dict().items():
        assert torch.equal(value, before[name]), name


# P6: resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("center", [False, True])
def test_p6_resumed_run_equals_uninterrupted_run(every, center, tmp_path):
    def build():
        return ClosedFormPredictor(6, rho=0.8, every=every, center=center)

    batches = torch.randn(10, 2, 16, 6)
    straight, first, second = build(), build(), build()
    for views in batches:
        straight.predict(list(views))
    for views in batches[:4]:
        first.predict(list(views))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for views in batches[4:]:
        resumed = second.predict(list(views))
    assert all(torch.equal(a, b) for a, b in zip(second.buffers(), straight.buffers(), strict=True))
    straight.eval()
    assert torch.equal(resumed[1], straight(batches[-1][1]))


def test_state_has_the_documented_names():
    plain = {"C", "W", "steps", "eigenvalues"}
    assert set(ClosedFormPredictor(3).state_dict()) == plain
    assert set(ClosedFormPredictor(3, center=True).state_dict()) == plain | {"mean", "mass"}
    assert set(RunningMoment(3).state_dict()) == {"C", "steps"}


# P8 and T4: half precision, large values, broken batches --------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_p8_half_precision_input(device, dtype, scale):
    require(device)
    z = (scale * torch.rand(256, 32, device=device)).to(dtype)
    half, full = ClosedFormPredictor(32).to(device), ClosedFormPredictor(32).to(device)
    with torch.autocast(device, dtype=dtype):
        (p,) = half.predict([z])
    (wanted,) = full.predict([z.float()])
    assert half.C.dtype == torch.float32
    assert p.dtype == torch.float32
    torch.testing.assert_close(half.C, full.C, rtol=2e-3, atol=0)
    torch.testing.assert_close(p, wanted, rtol=2e-3, atol=1e-5 * scale)
    assert p.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_t4_autocast_keeps_small_modes(device):
    """In half precision the modes below 2.5e-4 λmax are off by more than a tenth, and some negative."""
    require(device)
    scale = torch.logspace(0, -2, 32, device=device)  # eigenvalues from 1 to 1e-4
    z = torch.linalg.qr(torch.randn(512, 32, device=device)).Q * math.sqrt(512) * scale
    predictor = ClosedFormPredictor(32, rho=0.0).to(device)
    with torch.autocast(device, dtype=torch.float16):
        predictor.update(z)
    # D units in the last place of λmax; half precision is off by 1e-5 and more. A root's error is that over 2 sqrt(λ)
    rounding = 32 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(predictor.eigenvalues, scale**2, rtol=1e-5, atol=rounding)
    torch.testing.assert_close(torch.linalg.eigvalsh(predictor.W).flip(0), scale, rtol=1e-5, atol=rounding / 0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_t4_state_stays_in_float32_in_a_half_module(dtype):
    model = nn.Sequential(nn.Linear(4, 4), ClosedFormPredictor(4)).to(dtype)
    assert model[0].weight.dtype == dtype
    assert {b.dtype for b in model[1].buffers()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("center", [False, True])
def test_p8_non_finite_batch_does_not_poison(bad, center):
    predictor = ClosedFormPredictor(4, center=center)
    predictor.update(torch.randn(8, 4))
    before = copy.deepcopy(predictor.state_dict())
    z = torch.randn(8, 4)
    z[3, 2] = bad  # 1e30 is finite, its square is not
    predictor.update(z)
    after = predictor.state_dict()
    assert after.pop("steps") == before.pop("steps") + 1
    for name in before:
        assert torch.equal(after[name], before[name]), name


def test_empty_batch_is_skipped():
    predictor = ClosedFormPredictor(4)
    predictor.update(torch.randn(8, 4))
    before = predictor.C.clone()
    assert predictor.predict([torch.empty(0, 4)])[0].shape == (0, 4)
    assert torch.equal(predictor.C, before)


# P10: swapping views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_p10_pooled_loss_is_symmetric_in_the_views(metric):
    """This holds only if the views share W: in sequential mode each view has another W."""
    views = list(torch.randn(2, 32, 6, dtype=torch.float64) * torch.tensor([1.0, 2.0]).view(2, 1, 1))

    def loss(mode, order):
        z = [views[i] for i in order]
        p = ClosedFormPredictor(6, rho=0.5, mode=mode).double().predict(z)
        return byol_loss(p[0], z[1], metric) + byol_loss(p[1], z[0], metric)

    torch.testing.assert_close(loss("pooled", (0, 1)), loss("pooled", (1, 0)), rtol=1e-12, atol=0)
    assert abs(loss("sequential", (0, 1)) - loss("sequential", (1, 0))) > 1e-6


# T6, T7, T17: zero, ε, α = 2 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("alpha", "eps"), [*SETTINGS, (0.0, 0.0)])
def test_t6_zero_embeddings_stay_finite(alpha, eps, normalize):
    predictor = ClosedFormPredictor(4, alpha=alpha, eps=eps, normalize=normalize)
    wanted = (float(normalize) + eps) ** alpha * torch.eye(4)
    torch.testing.assert_close(predictor.W, wanted)
    for z in (torch.zeros(8, 4), torch.full((8, 4), 1e-25)):  # whose square underflows
        (p,) = predictor.predict([z])
        torch.testing.assert_close(predictor.W, wanted)
        assert p.isfinite().all()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_t6_eps_counts_without_normalisation(alpha):
    """The fork ignores it without a message. With α = 1 this is DirectCopy as first published, W = C + εI."""
    z = torch.randn(32, 4, dtype=torch.float64)
    predictor = ClosedFormPredictor(4, alpha=alpha, eps=0.3, normalize=False, rho=0.5).double()
    predictor.update(z)
    squared = torch.linalg.matrix_power(predictor.W, round(2 / alpha))  # of power 2 for each α
    torch.testing.assert_close(squared, torch.linalg.matrix_power(predictor.C + 0.3 * torch.eye(4), 2))


@pytest.mark.parametrize("normalize", [True, False])
def test_t7_alpha_two_is_no_special_case(normalize):
    """Continuous in α through 2, negative rounding errors clamped, with and without normalisation."""
    z = torch.randn(4, 16)  # rank-deficient: the fork's negative eigenvalues
    weights = []
    for alpha in (2.0, 2.0 + 1e-6):
        predictor = ClosedFormPredictor(16, alpha=alpha, normalize=normalize, rho=0.0)
        predictor.update(z)
        weights.append(predictor.W)
        assert predictor.eigenvalues.min() >= 0
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-4)


def test_t8_prediction_stays_in_the_basis_of_z():
    """Any number of views with any numbers of rows, each compared with unrotated targets."""
    scale = torch.tensor([2.0, 1.0, 1.0, 0.5])
    predictor = ClosedFormPredictor(4, rho=0.998, mode="pooled")
    views = [torch.randn(rows, 4) * scale for rows in (4000, 4000, 1000, 1000)]
    predictions = predictor.predict(views)
    for z, p in zip(views, predictions, strict=True):
        assert p.shape == z.shape
        torch.testing.assert_close(p, z * scale / 2, rtol=0.1, atol=0.2)
    torch.testing.assert_close(predictor.C, 0.002 * torch.cat(views).T @ torch.cat(views) / 10000, rtol=1e-5, atol=1e-8)


def test_t11_eigenvalues_are_sorted_and_cost_no_second_solve(monkeypatch):
    calls = []
    for name in ("eigh", "eigvalsh", "eig"):
        original = getattr(torch.linalg, name)
        monkeypatch.setattr(torch.linalg, name, lambda m, f=original, name=name: calls.append(name) or f(m))
    z = torch.randn(32, 8) * torch.logspace(-1, 0, 8)
    predictor = ClosedFormPredictor(8, mode="pooled")
    predictor.predict([z, z])
    assert calls == ["eigh"]
    assert (predictor.eigenvalues.diff() <= 0).all()

    logged = RunningMoment(8, 0.99)  # what BYOL logs: nothing is solved until asked for
    calls.clear()
    logged.update(z)
    assert calls == []
    spectrum = logged.spectrum()
    assert calls == ["eigvalsh"]
    torch.testing.assert_close(spectrum, torch.as_tensor(np.linalg.eigvalsh(logged.C.numpy())[::-1].copy()))


def test_t17_zero_row_has_finite_gradient():
    z = torch.randn(8, 4)
    z[2] = 0
    z.requires_grad_()
    (p,) = ClosedFormPredictor(4).predict([z])
    byol_loss(p, torch.randn(8, 4), "cosine").backward()
    assert p.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()


# Errors, copies, compilation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"eps": -0.1}, "eps"),
        ({"rho": 1.0}, "rho"),
        ({"rho": math.nan}, "rho"),
        ({"every": 0}, "every"),
        ({"mode": "both"}, "mode"),
    ],
)
def test_rejects_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        ClosedFormPredictor(4, **options)


@pytest.mark.parametrize("z", [torch.zeros(3, 5), torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(3, 4).int()])
def test_rejects_bad_embeddings(z):
    predictor = ClosedFormPredictor(4)
    with pytest.raises(ValueError, match="z must"):
        predictor.update(z)
    with pytest.raises(ValueError, match="z must"):
        predictor(z)
    assert int(predictor.steps) == 0


def test_deep_copy_goes_its_own_way():
    predictor = ClosedFormPredictor(4, every=2)
    predictor.update(torch.randn(8, 4))
    other = copy.deepcopy(predictor)
    for _ in range(2):
        z = torch.randn(8, 4)
        predictor.update(z)
        other.update(z)
        assert torch.equal(predictor.W, other.W)
    other.update(torch.randn(8, 4))
    assert not torch.equal(predictor.C, other.C)


@pytest.mark.slow
def test_compiled_step_equals_eager_step_and_compiles_once():
    eager, compiled = ClosedFormPredictor(8, rho=0.9), ClosedFormPredictor(8, rho=0.9)

    @torch.compile(backend="aot_eager")
    def step(first, second):
        p, _ = compiled.predict([first, second])
        return byol_loss(p, second, "cosine")

    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            first, second = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
            wanted = byol_loss(eager.predict([first, second])[0], second, "cosine")
            loss = step(first, second)
            loss.backward()
            torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(compiled.C, eager.C)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_moment_does_not_wait_for_the_device():
    require("cuda")
    moment = RunningMoment(64, center=True).cuda()
    z = torch.randn(128, 64, device="cuda")
    moment.update(z)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moment.update(z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# P7 and T3: several processes -----------------------------------------------------------------------------------------


def _train(comm, steps, options):
    """Predict two views a step; what a rank holds in the end, and its last predictions."""
    predictor = ClosedFormPredictor(6, rho=0.7, comm=comm, **options).double()
    predictions = []
    for views in steps:
        predictions = predictor.predict(list(views))
    return predictor.state_dict(), predictions


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(5, 11), (3, 9, 20), (0, 7, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 1.0, "eps": 0.25}, {"mode": "pooled"}, {"center": True}, {"every": 2}],
    ids=["directpred", "directcopy", "pooled", "center", "every"],
)
def test_p7_t3_state_is_that_of_the_joined_batch_on_every_rank(ranks, counts, options):
    """Ranks of different rows, numbers of rows and means; one non-finite row on the last rank in the second step."""
    steps = torch.randn(4, 2, sum(counts), 6, dtype=torch.float64)
    offset = 0
    for rank, count in enumerate(counts):
        steps[:, :, offset : offset + count] += 3.0 * rank
        offset += count
    steps[1, 0, -1, 2] = math.nan
    wanted, predictions = _train(LOCAL, steps, options)

    arguments = [(part.contiguous(), options) for part in steps.split(counts, dim=2)]
    answers = ranks.run(_train, arguments)
    assert len(answers) == len(counts)
    for state, _ in answers:
        for name, value in state.items():
            assert torch.equal(value, answers[0][0][name]), name  # identical on all ranks, to the bit
            torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-10)
    for view in range(2):
        joined = torch.cat([part[view] for _, part in answers])
        torch.testing.assert_close(joined, predictions[view], rtol=1e-9, atol=1e-10)


def _moment(comm, z):
    moment = RunningMoment(6, 0.5, comm=comm)
    moment.update(z)
    return moment.C


@pytest.mark.ddp
def test_p7_running_moment_joins_ranks_in_float32(ranks):
    z = torch.randn(16, 6) * torch.logspace(0, -2, 6)
    first, second = ranks.run(_moment, [(z[:5],), (z[5:],)])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, _moment(LOCAL, z), rtol=1e-5, atol=1e-7)
