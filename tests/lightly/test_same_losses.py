"""Losses that lightly also has: the same value on one process."""

import importlib

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NTXentLoss, SwaVLoss
from lightly.loss import DINOLoss as LightlyDINO
from lightly.loss import VICRegLoss as LightlyVICReg

from plugins.losses import DINOLoss, barlow_twins_loss, lejepa_loss, moco_loss, simclr_loss, swav_loss, vicreg_loss
from plugins.testing import toy_views

pytestmark = pytest.mark.lightly


def test_simclr():
    views = toy_views(6, 5)
    expected = NTXentLoss(temperature=0.2)(*views)
    torch.testing.assert_close(simclr_loss(views, temperature=0.2), expected, rtol=1e-10, atol=0)


def test_barlow_twins():
    views = toy_views(6, 5)
    expected = BarlowTwinsLoss(lambda_param=0.01)(*views)
    torch.testing.assert_close(barlow_twins_loss(*views, lambd=0.01), expected, rtol=1e-10, atol=0)


def test_vicreg():
    views = toy_views(6, 5)
    expected = LightlyVICReg(lambda_param=3, mu_param=5, nu_param=0.7)(*views)
    found = vicreg_loss(*views, sim_coeff=3, std_coeff=5, cov_coeff=0.7)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("queued", [False, True])
def test_swav(queued):
    scores = [view.tanh() for view in toy_views(6, 5, views=4)]
    queue = [view.tanh() for view in toy_views(9, 5, seed=1)] if queued else None
    expected = SwaVLoss()(scores[:2], scores[2:], queue)
    torch.testing.assert_close(swav_loss(scores, queue_scores=queue), expected.squeeze(), rtol=1e-10, atol=0)


def test_moco():
    query, key = toy_views(6, 5)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(9, 5))
    theirs.memory_bank.bank = torch.nn.functional.normalize(toy_views(9, 5, views=1)[0], dim=1)
    queue = theirs.memory_bank.bank.clone()
    torch.testing.assert_close(moco_loss(query, key, queue), theirs(query, key), rtol=1e-10, atol=0)


def test_dino_for_two_steps():
    ours, theirs = DINOLoss(5, tau_teacher=0.05), LightlyDINO(5, teacher_temp=0.05, warmup_teacher_temp_epochs=0)
    for seed in range(2):
        views = [view.float() for view in toy_views(6, 5, views=6, seed=seed)]
        student, teacher = views[:4], views[4:]
        expected = theirs(teacher, student, teacher_temp=0.05)
        torch.testing.assert_close(ours(student, teacher).loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.center, theirs.center.flatten(), rtol=1e-6, atol=1e-7)


@pytest.mark.slow  # of the newest release: in lightly 1.5 the loss of this name has another value
def test_lejepa():
    """lightly draws its directions itself, has the domain [0, 3], and needs a small crop."""
    theirs = importlib.import_module("lightly.loss.lejepa_loss")
    views = [*toy_views(7, 5, views=3)]
    torch.manual_seed(0)
    expected = theirs.LeJEPALoss(sigreg_num_vectors=9)(global_proj=torch.stack(views[:2]), local_proj=views[2][None])
    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(5, 9, dtype=torch.float64), dim=0).T
    found = lejepa_loss(views, directions, large=2, t_max=3.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # its knots are in float32
