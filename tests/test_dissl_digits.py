"""DISSL and CISSL on real digits, with an MLP as encoder: what each learns, and the stall that the alarm is for.

Losses, heads and alarm are ours; encoder, views and probe are of this file. Each training is 300 steps of 256 images.
A training amplifies rounding, so that another machine is another draw. Standard deviations over 8 seeds: accuracy of a
trained encoder 0.004 with all labels and 0.011 with few, entropies 0.04. Every bound is five of them away or more.
"""

import math
import warnings
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from plugins.losses import StallAlarm, cissl_loss, dissl_terms

pytestmark = pytest.mark.slow
STEPS, BATCH, CLUSTERS = 300, 256, 256
METHODS = {"random": 1.0, "simclr": 1.0, "cissl": 1.0, "dissl": 1.0, "dissl weak": 0.25, "dissl strong": 2.0}
"""Trained method → strength of its views."""


class Outcome(NamedTuple):
    """Accuracy with all labels and (of DISSL) with 20; loss, entropies of the last step; the alarm's warnings."""

    all_labels: float
    few_labels: float = math.nan
    loss: float = math.nan
    H_M: float = math.nan
    H_Mlz: float = math.nan
    warned: tuple[str, ...] = ()


def _digits():
    """1297 training and 500 test images in [0, 1] as [N, 1, 8, 8], and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(labels))
    images = torch.tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    labels = torch.tensor(labels[order])
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def _view(images, strength):
    """Rotated, scaled and shifted at random, with noise."""
    count = len(images)
    angle = strength * 0.4 * (2 * torch.rand(count) - 1)
    scale = 1 + strength * 0.25 * (2 * torch.rand(count) - 1)
    shift = strength * 0.3 * (2 * torch.rand(count, 2) - 1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(count, 2, 3)
    moved = F.grid_sample(images, F.affine_grid(affine, list(images.shape), align_corners=False), align_corners=False)
    return moved + strength * 0.1 * torch.randn_like(moved)


def _hidden(in_dim, out_dim):
    return nn.Linear(in_dim, out_dim), nn.BatchNorm1d(out_dim), nn.ReLU()


def _encoder():
    return nn.Sequential(nn.Flatten(), *_hidden(64, 256), *_hidden(256, 64))


def _heads(method):
    """Teacher and student head: an MLP and a linear map; SimCLR has one for both."""
    width = CLUSTERS if method == "dissl" else 64

    def norm():
        return () if method == "dissl" else (nn.BatchNorm1d(width),)

    teacher = nn.Sequential(*_hidden(64, 256), nn.Linear(256, width), *norm())
    if method == "simclr":
        return teacher, teacher
    return teacher, nn.Sequential(nn.Linear(64, width), *norm())


@cache
def _train(name, seed):
    """The outcome, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        outcome = _outcome(name, seed)
    torch.set_num_threads(threads)
    return outcome


def _outcome(name, seed):
    images, labels, test_images, test_labels = _digits()
    method, strength = name.split()[0], METHODS[name]
    torch.manual_seed(seed)
    encoder = _encoder()
    numbers = {}
    if method != "random":
        numbers = _pretrain(encoder, method, strength, images)
    encoder.eval()
    with torch.no_grad():
        features, test_features = encoder(images).numpy(), encoder(test_images).numpy()
    labels, test_labels = labels.numpy(), test_labels.numpy()

    def score(rows):
        probe = LogisticRegression(max_iter=5000).fit(features[rows], labels[rows])
        return probe.score(test_features, test_labels)

    few = {"few_labels": float(np.mean([score(rows) for rows in _few(labels)]))} if method == "dissl" else {}
    return Outcome(score(slice(None)), **few, **numbers)


def _few(labels):
    """Twenty draws of two labels of each digit: one draw is a matter of luck, three points up or down."""
    rng = np.random.RandomState(0)
    return [
        np.concatenate([rng.choice(np.flatnonzero(labels == digit), 2, replace=False) for digit in range(10)])
        for _ in range(20)
    ]


def _pretrain(encoder, method, strength, images):
    teacher, student = _heads(method)
    parameters = {id(p): p for module in (encoder, teacher, student) for p in module.parameters()}
    optimizer = torch.optim.Adam(parameters.values(), lr=2e-3, weight_decay=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    alarm = StallAlarm(CLUSTERS, after=200, every=50)
    numbers = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, STEPS + 1):
            batch = images[torch.randperm(len(images))[:BATCH]]
            z = encoder(torch.cat([_view(batch, strength), _view(batch, strength)]))
            targets, outputs = teacher(z).chunk(2), student(z).chunk(2)
            if method == "dissl":
                terms = dissl_terms(targets, outputs)
                loss = terms.loss
                alarm(terms.H_Mlz, step)
                numbers = {"H_M": terms.H_M.item(), "H_Mlz": terms.H_Mlz.item()}
            else:
                loss = cissl_loss(outputs, targets, positives="other" if method == "simclr" else "all")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    warned = tuple(str(warning.message) for warning in caught if "stalled" in str(warning.message))
    return {**numbers, "loss": loss.item(), "warned": warned}


each_seed = pytest.mark.parametrize("seed", [0, 1])


@each_seed
@pytest.mark.parametrize("name", ["simclr", "cissl", "dissl", "dissl weak"])
def test_every_method_learns(name, seed):
    assert _train(name, seed).all_labels >= _train("random", seed).all_labels + 0.06


@each_seed
def test_cissl_is_as_good_as_simclr(seed):
    assert _train("cissl", seed).all_labels == pytest.approx(_train("simclr", seed).all_labels, abs=0.03)


@each_seed
@pytest.mark.parametrize("name", ["dissl", "dissl weak"])
def test_dissl_uses_its_clusters(name, seed):
    assert 0.85 * math.log(CLUSTERS) <= _train(name, seed).H_M <= math.log(CLUSTERS) + 1e-6


def test_stronger_views_pay_where_labels_are_few():
    """Strong views join more images into a cluster: accuracy is higher with few labels, and lower with all labels.

    Per seed the differences are 0.034 ± 0.010 and 0.017 ± 0.004.
    """
    usual, weak = ([_train(name, seed) for seed in range(3)] for name in ("dissl", "dissl weak"))
    assert all(w.H_Mlz < 1 < u.H_Mlz and u.warned == w.warned == () for u, w in zip(usual, weak, strict=True))
    assert np.mean([u.few_labels - w.few_labels for u, w in zip(usual, weak, strict=True)]) > 0
    assert np.mean([w.all_labels - u.all_labels for u, w in zip(usual, weak, strict=True)]) > 0


def test_too_strong_views_stall_and_the_alarm_says_so():
    strong = _train("dissl strong", 0)
    assert strong.loss == pytest.approx((1 - 2.3 + 0.8) * math.log(CLUSTERS), abs=0.01)
    assert strong.H_Mlz > 0.99 * math.log(CLUSTERS)
    assert len(strong.warned) == 1 and "uniform assignments" in strong.warned[0]
    assert strong.all_labels < _train("random", 0).all_labels + 0.06
