"""Losses that solo-learn also has: the same values and gradients on one process, and the differences by design."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from plugins.linalg import sinkhorn_codes
from plugins.losses import DINOLoss, barlow_twins_loss, moco_loss, simclr_loss, swav_loss, vicreg_loss
from plugins.testing import assert_same_loss, toy_views
from solo_ext.compat import GENERATION

pytestmark = pytest.mark.solo
MAIN = GENERATION == "main"


def _views(count: int, seed: int = 0) -> list[Tensor]:
    return [view.float().requires_grad_() for view in toy_views(7, 5, views=count, seed=seed)]


def _simclr(*views: Tensor) -> Tensor:
    from solo.losses import simclr_loss_func

    if not MAIN:
        return simclr_loss_func(*views, temperature=0.2)
    return simclr_loss_func(torch.cat(views), torch.arange(7).repeat(len(views)), temperature=0.2)


def test_simclr():
    assert_same_loss(lambda *z: simclr_loss(z, temperature=0.2), _simclr, _views(2))


@pytest.mark.skipif(not MAIN, reason="1.0.2's function takes two views")
def test_simclr_with_more_views_is_the_mean_over_the_positives_instead_of_the_log_of_their_sum():
    """solo-learn's loss is smaller by at least log(V - 1), and by just that if the positives are equal."""
    views = _views(4)
    ours = simclr_loss(views, temperature=0.2).item()
    assert ours > _simclr(*views).item() + math.log(3)
    equal = [views[0]] * 4
    assert simclr_loss(equal, temperature=0.2).item() == pytest.approx(_simclr(*equal).item() + math.log(3), rel=1e-5)


def test_barlow_twins():
    """solo-learn's loss is multiplied by 0.025."""
    from solo.losses import barlow_loss_func

    assert_same_loss(
        lambda *z: 0.025 * barlow_twins_loss(*z, lambd=0.01),
        lambda *z: barlow_loss_func(*z, lamb=0.01, scale_loss=0.025),
        _views(2),
    )


def test_vicreg():
    """solo-learn adds the hinge over both views, of which ours is the mean."""
    from solo.losses import vicreg_loss_func

    assert_same_loss(
        lambda *z: vicreg_loss(*z, sim_coeff=3, std_coeff=10, cov_coeff=0.7),
        lambda *z: vicreg_loss_func(*z, sim_loss_weight=3, var_loss_weight=5, cov_loss_weight=0.7),
        _views(2),
    )


def test_moco():
    """solo-learn's loss takes unit rows. Its MoCo v2+ is the mean of both orders of views, with separate queues."""
    from solo import losses

    theirs = losses.mocov2plus_loss_func if MAIN else losses.moco_loss_func
    query, key = _views(2)
    queue = normalize(toy_views(9, 5, views=1, seed=1)[0].float(), dim=1)
    unit = normalize(key.detach(), dim=1)
    assert_same_loss(
        lambda q: moco_loss(q, key, queue, temperature=0.2),
        lambda q: theirs(normalize(q, dim=1), unit, queue.T, temperature=0.2),
        [query],
    )


@pytest.mark.parametrize("count", [2, 4])
def test_swav(count):
    """The codes too. With small crops only main's function has the codes of the large views alone."""
    from solo.losses import swav_loss_func
    from solo.utils.sinkhorn_knopp import SinkhornKnopp

    if count > 2 and not MAIN:
        pytest.skip("1.0.2's function needs codes of every view")
    scores = [normalize(view, dim=1) for view in _views(count)]
    codes = [SinkhornKnopp(num_iters=3, epsilon=0.05)(view.detach()) for view in scores[:2]]
    ours = sinkhorn_codes(torch.stack(scores[:2]), epsilon=0.05, iterations=3)
    torch.testing.assert_close(ours, torch.stack(codes), rtol=1e-4, atol=1e-6)
    leaves = [view.detach().requires_grad_() for view in scores]
    assert_same_loss(lambda *s: swav_loss(s), lambda *s: swav_loss_func(list(s), codes), leaves)


@pytest.mark.parametrize("count", [2, 5])
def test_dino_for_two_steps(count):
    """solo-learn's loss takes two views of the teacher and ``count`` of the student; the centres are equal."""
    from solo.losses.dino import DINOLoss as Theirs

    ours = DINOLoss(5, tau_teacher=0.05)
    theirs = Theirs(5, 0.05, 0.05, 0, num_epochs=2, num_large_crops=count)
    for seed in range(2):
        student, teacher = _views(count, seed), [view.detach() for view in _views(2, seed + 5)]
        assert_same_loss(
            lambda *s, teacher=teacher: ours(s, teacher).loss,
            lambda *s, teacher=teacher: theirs(torch.cat(s), torch.cat(teacher)),
            student,
        )
        torch.testing.assert_close(ours.center, theirs.center.flatten(), rtol=1e-5, atol=1e-6)
