"""LeJEPA: known values, closed forms of the statistic, slow reference, recurrence, draws, several processes."""

import copy
import math

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.losses import LeJEPALoss, lejepa_loss, lejepa_terms
from plugins.losses.lejepa import _waves
from plugins.methods import METHODS
from plugins.spec import Embeddings
from plugins.testing import assert_joined, toy_views

FINE = {"t_max": 9.0, "knots": 361}
"""The trapezoid rule is exact to rounding for rows within 20 of each other."""
ROOT = math.sqrt(2 * math.pi)


def _directions(count, width, seed=1):
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.norm(dim=1, keepdim=True)


def _reference_lejepa(views, directions, large, weight=0.05, t_max=5.0, knots=17):
    """One direction, one view and one knot at a time, as a complex number, over the whole domain [-t_max, t_max]."""
    step = t_max / (knots - 1)
    statistics = []
    for z in views:
        for a in directions:
            x = z @ a
            total = 0.0
            for k in range(1 - knots, knots):
                t = k * step
                share = 0.5 if abs(k) == knots - 1 else 1.0
                phi = np.mean(np.exp(1j * t * x))
                total += share * step * abs(phi - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2)
            statistics.append(len(x) * total)
    centre = sum(views[:large]) / large
    prediction = np.mean([np.mean((z - centre) ** 2) for z in views])
    return (1 - weight) * prediction + weight * np.mean(statistics)


def _plain(views, directions, large, weight=0.05, t_max=5.0, knots=17):
    """The formula with all cosines at the same time, left to autograd."""
    z, t = torch.stack(views), torch.linspace(0, t_max, knots, dtype=torch.float64)
    normal = torch.exp(-t.square() / 2)
    phase = (z @ directions.T)[..., None] * t
    error = (phase.cos().mean(1) - normal).square() + phase.sin().mean(1).square()
    statistic = 2 * z.shape[1] * torch.trapezoid(error * normal, t).mean()
    return (1 - weight) * (z - z[:large].mean(0)).square().mean() + weight * statistic


def test_known_values():
    zero = torch.zeros(2, 8, 3, dtype=torch.float64)
    terms = lejepa_terms(zero, torch.eye(3, dtype=torch.float64), **FINE)
    assert terms.sigreg.item() == pytest.approx(8 * (ROOT - 2 * math.sqrt(math.pi) + ROOT / math.sqrt(3)), rel=1e-12)
    assert terms.sigreg.item() == pytest.approx(8 * 0.408923, rel=1e-6) and terms.prediction.item() == 0
    z, _ = toy_views(6, 3)
    opposite = lejepa_terms([z, -z], torch.eye(3, dtype=torch.float64))
    assert opposite.prediction.item() == pytest.approx(z.square().mean().item(), rel=1e-12)
    one_large = lejepa_terms([z, -z], torch.eye(3, dtype=torch.float64), large=1, sigreg_weight=0.25)
    assert one_large.prediction.item() == pytest.approx(2 * z.square().mean().item(), rel=1e-12)
    whole = 0.75 * one_large.prediction + 0.25 * one_large.sigreg
    assert one_large.loss.item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_statistic_is_that_of_epps_and_pulley():
    """Its closed form as sums over pairs of rows, and that of rows far from each other and from 0."""
    z = 2 * torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = _directions(3, 4)
    x = (z @ a.T).T
    pairs = torch.exp(-((x[:, :, None] - x[:, None]) ** 2) / 2).mean((1, 2))
    expected = 7 * (ROOT * pairs - 2 * math.sqrt(math.pi) * torch.exp(-x.square() / 4).mean(1) + ROOT / math.sqrt(3))
    assert lejepa_terms([z], a, **FINE).sigreg.item() == pytest.approx(expected.mean().item(), rel=1e-10)
    far = torch.tensor([[40.0], [-40.0], [80.0]], dtype=torch.float64)
    found = lejepa_terms([far], torch.ones(1, 1, dtype=torch.float64), **FINE).sigreg.item()
    assert found == pytest.approx(ROOT + 3 * ROOT / math.sqrt(3), rel=1e-10)


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_expectation_for_gaussian_rows(scale):
    """The floor is √(2π) (1 - 1/√3) for every number of rows; a wrong variance grows with it."""
    rows, s2 = 64, scale**2
    z = scale * torch.randn(rows, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = ROOT / math.sqrt(2 * s2 + 1) - 2 * ROOT / math.sqrt(s2 + 2) + ROOT / math.sqrt(3)
    expected = rows * bias + ROOT - ROOT / math.sqrt(2 * s2 + 1)
    assert scale != 1 or expected == pytest.approx(1.059425765, rel=1e-9)
    found = lejepa_terms([z], torch.eye(1500, dtype=torch.float64)).sigreg.item()
    assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("views", "large", "t_max", "knots"), [(2, 2, 5.0, 17), (4, 2, 3.0, 9), (3, 1, 2.0, 2)])
def test_equals_the_slow_reference(views, large, t_max, knots):
    z, a = toy_views(5, 4, views=views), _directions(6, 4)
    options = {"t_max": t_max, "knots": knots}
    free = [view.requires_grad_() for view in z]
    loss = lejepa_loss(free, a, large=large, sigreg_weight=0.3, **options)
    expected = _reference_lejepa([view.detach().numpy() for view in z], a.numpy(), large, 0.3, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    plain = _plain(free, a, large, 0.3, **options)
    for ours, theirs in zip(torch.autograd.grad(loss, free), torch.autograd.grad(plain, free), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    single = lejepa_loss([view.detach().float() for view in z], a.float(), large=large, sigreg_weight=0.3, **options)
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-5)


def test_blocks_of_directions_add_up(monkeypatch):
    z, a = toy_views(5, 4), _directions(37, 4)
    free = [view.requires_grad_() for view in z]
    expected = lejepa_loss(free, a)
    gradients = torch.autograd.grad(expected, free)
    monkeypatch.setattr("plugins.losses.lejepa._CPU_BLOCK", 50)
    found = lejepa_loss(free, a)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, free), gradients, rtol=1e-10, atol=1e-14)


def test_the_recurrence_is_accurate_in_float32():
    """Near multiples of π its error grows with the square of the number of knots."""
    x = torch.cat([torch.linspace(-20, 20, 20001), 1e-3 * torch.linspace(-1, 1, 201) + 16 * math.pi / 5])
    step = 5 / 16
    base = (x * step).double()
    seen = 0
    for k, cosine, sine in _waves(x, step, 17):
        sign = 1 if k % 4 < 2 else -1
        assert (sign * cosine - torch.cos(k * base)).abs().max() < 2e-5
        assert (sign * sine - torch.sin(k * base)).abs().max() < 2e-5
        seen += 1
    assert seen == 16


def test_rows_a_period_apart_are_equal():
    """The statistic has the period 2π (knots - 1) / t_max in each direction, and half of it is none."""
    z = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, period = torch.ones(1, 1, dtype=torch.float64), 2 * math.pi * 16 / 5
    moved, between = z.clone(), z.clone()
    moved[2] += period
    between[2] += period / 2
    sigreg = [lejepa_terms([rows], one).sigreg.item() for rows in (z, moved, between)]
    assert sigreg[1] == pytest.approx(sigreg[0], rel=1e-9) and abs(sigreg[2] / sigreg[0] - 1) > 0.1


def test_rotated_rows_and_directions_have_the_same_loss():
    z, a = toy_views(6, 4), _directions(5, 4)
    rotation = torch.linalg.qr(_directions(4, 4, seed=2)).Q
    turned = lejepa_loss([view @ rotation for view in z], a @ rotation)
    assert turned.item() == pytest.approx(lejepa_loss(z, a).item(), rel=1e-10)


def test_directions_of_a_step_are_the_same_after_a_resume_and_for_micro_batches():
    z = toy_views(6, 4)
    module = LeJEPALoss(num_directions=8)
    saved = copy.deepcopy(module)
    first, second = module(z).item(), module(z).item()
    assert first != second
    assert saved(z).item() == first
    resumed = LeJEPALoss(num_directions=8)
    resumed.load_state_dict(saved.state_dict())
    assert resumed(z).item() == second
    stepped = LeJEPALoss(num_directions=8)
    stepped.clock.before_step()
    assert [stepped(z).item(), stepped(z).item()] == [first, first]
    assert LeJEPALoss(num_directions=8, seed=1)(z).item() != first


def test_the_method_counts_the_large_views():
    spec = METHODS["lejepa"]
    criterion = spec.loss(spec.resolve({"num_directions": 4, "sigreg_weight": 0.0}), LOCAL)
    z = toy_views(6, 4, views=3)
    for large in (1, 2, 3):
        centre = torch.stack(z[:large]).mean(0)
        expected = (torch.stack(z) - centre).square().mean().item()
        assert criterion(Embeddings(z, z, z[:large])).loss.item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, a: lejepa_loss([], a), "needs at least 1 view, got 0"),
        (lambda z, a: lejepa_loss(z, a[:, :2]), r"directions must be \[M, 4\], as wide as the views, got \(5, 2\)"),
        (lambda z, a: lejepa_loss(z, a, large=3), r"large must be in \[1, 2\], got 3"),
        (lambda z, a: lejepa_loss(z, a, large=0), r"large must be in \[1, inf\), got 0"),
        (lambda z, a: lejepa_loss(z, a, sigreg_weight=1.5), r"sigreg_weight must be in \[0, 1\], got 1.5"),
        (lambda z, a: lejepa_loss(z, a, knots=1), r"knots must be in \[2, inf\), got 1"),
        (lambda z, a: lejepa_loss(z, a, t_max=0.0), "t_max must be in "),
        (lambda z, a: lejepa_loss([view[:0] for view in z], a), "needs at least 1 rows over all processes, got 0"),
        (lambda z, a: LeJEPALoss(num_directions=0), r"num_directions must be in \[1, inf\), got 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_views(6, 4), _directions(5, 4))


def _step(comm, model, z0, z1, z2):
    loss = LeJEPALoss(num_directions=6, sigreg_weight=0.3, comm=comm)
    return loss([model(z0), model(z1), model(z2)], large=2)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(8, 3), (2, 9, 1), (5, 0, 4)])
def test_ranks_equal_the_joined_batch(ranks, counts):
    assert_joined(ranks, _step, toy_views(sum(counts), 5, views=3), counts)
