"""Benchmark losses and predictors against plain implementations, training steps against solo-learn, and data loading.

``losses`` and ``predictors`` run forward and backward of two functions of the same inputs in one process, interleaved.
"plain" is a direct implementation of the published formula with autograd (for the predictor: with the general
eigensolver; for Barlow Twins: lightly's loss, if lightly is installed). "ours" is the implementation of this package.
The table has the median times, the median ratio over rounds, and the ratio of the operation counts ("floor"), which is
the speed-up that the arithmetic alone explains. The results of the two functions are compared as well. ``step``
measures complete training steps, ``data`` the loading of images: see :mod:`plugins.experiments.bench_step` and
:mod:`plugins.experiments.bench_data`.

    python -m plugins.experiments.bench losses --sizes 256x512 256x2048
    python -m plugins.experiments.bench predictors --device cuda
    python -m plugins.experiments.bench step --device cuda --precision 16 --batch 256 data.dataset=cifar10
    python -m plugins.experiments.bench data --images datasets/imagenet/train --device gpu --workers 16
    python -m plugins.experiments.bench all --json results/bench.json
"""

import argparse
import fnmatch
import importlib
import importlib.util
import json
import math
import platform
import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from plugins.experiments import bench_data, bench_step
from plugins.losses import (
    RectifiedLpJEPALoss,
    amdim_nce,
    barlow_twins_loss,
    byol_loss,
    cissl_loss,
    corinfomax_loss,
    cpc_terms,
    dissl_loss,
    draw_negatives,
    i_vne_loss,
    isoloss,
    lejepa_loss,
    matrix_ssl_loss,
    mec_loss,
    pirl_loss,
    rectified_lpjepa_loss,
    relic_loss,
    simdino_loss,
    ssl_ey_loss,
    vicreg_loss,
)
from plugins.predictors import ClosedFormPredictor
from plugins.targets import IndexedBank, balanced_labels, kmeans, sinkhorn_codes
from plugins.tools.command import integer_from

QUICK_SIZES = ((256, 128), (256, 512), (1024, 512), (256, 2048))
SIZES = (*QUICK_SIZES, (1024, 2048), (2048, 2048), (2048, 8192))
WIDE_AND_TALL = ((256, 512), (256, 1024), (1024, 256), (1024, 512))
PREDICTOR_SIZES = ((256, 128), (256, 256), (256, 512))
GENERAL_EIG, SYMMETRIC_EIG = 25, 9
"""Operations of an eigendecomposition with eigenvectors, in units of D^3, for a general and a symmetric matrix."""
MEC_EPS = 1 / 8


class Case(NamedTuple):
    """A benchmark. ``make(rows, width, device)`` returns the inputs; both functions return the same result."""

    make: Callable[[int, int, str], list[Tensor]]
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    extra_flops: Callable[[int, int], tuple[float, float]] = lambda rows, width: (0, 0)
    """Number of operations that are not matrix products, of plain and of ours."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Default sizes, of which ``--quick`` runs the first only; () means the sizes that all cases share."""
    work: Callable[[int, int], float] = lambda rows, width: rows * width**2 + width**3
    """A quantity to which the time is proportional."""


class Result(NamedTuple):
    """One row of the table. Seconds and bytes are those of forward and backward together."""

    case: str
    rows: int
    width: int
    plain_seconds: float
    ours_seconds: float
    time_ratio: float
    flop_ratio: float | None
    plain_bytes: int
    ours_bytes: int
    difference: float


def _views(rows: int, width: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(rows, width, generator=generator)
    views = [common + torch.randn(rows, width, generator=generator) for _ in range(2)]
    return [view.to(device).requires_grad_() for view in views]


def _predicted_views(rows: int, width: int, device: str) -> list[Tensor]:
    """Return z, target, W and the square root of W."""
    z, target = _views(rows, width, device)
    values = torch.linspace(0.1, 1, width, device=device)
    return [z, target.detach(), values.diag(), values.sqrt().diag()]


def _four_views(rows: int, width: int, device: str) -> list[Tensor]:
    """Return the predictions and the targets of two views."""
    views = _views(rows, width, device)
    return [*views, *((view + 0.5 * view.roll(1, 1)).detach() for view in views)]


def _moments(rows: int, width: int, device: str) -> list[Tensor]:
    """Return rows whose second moment has a decaying spectrum."""
    scale = torch.arange(1, width + 1, device=device) ** -0.5
    return [_views(rows, width, device)[0].detach() * scale]


def _plain_ssl_ey(x: Tensor, y: Tensor) -> Tensor:
    a, b, k = x - x.mean(0), y - y.mean(0), x.shape[0] - 1
    c = 2 / k * a.T @ b
    v = a.T @ a / k + b.T @ b / k
    loss = -2 * torch.trace(c) + torch.trace(v @ v)
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _ours_ssl_ey(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(ssl_ey_loss(x, y), (x, y)))


def _plain_byol(p: Tensor, target: Tensor) -> Tensor:
    loss = 2 - 2 * (F.normalize(p, dim=1) * F.normalize(target.detach(), dim=1)).sum(1).mean()
    return torch.autograd.grad(loss, p)[0]


def _ours_byol(p: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(byol_loss(p, target), p)[0]


def _plain_isoloss(z: Tensor, target: Tensor, w: Tensor, root: Tensor) -> Tensor:
    p, q = (z @ w).detach(), z @ root
    lengths, target_lengths = p.norm(dim=1), target.norm(dim=1)
    first = (z * target).sum(1) / (lengths * target_lengths)
    second = (p * target).sum(1) / (lengths**3 * target_lengths) * q.square().sum(1)
    return torch.autograd.grad(-2 * (first - 0.5 * second).mean(), z)[0]


def _ours_isoloss(z: Tensor, target: Tensor, w: Tensor, _root: Tensor) -> Tensor:
    return torch.autograd.grad(isoloss(z, z.detach() @ w, target), z)[0]


def _plain_matrix_ssl(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """Compute the loss as the published code: with the N x N centring matrix and one unused matrix power."""
    n, width = z0.shape
    eye = torch.eye(width, device=z0.device)
    loss = z0.new_zeros(())
    for z, p in ((z0, p1), (z1, p0)):
        z, p = F.normalize(z, dim=1), F.normalize(p, dim=1)
        for left, right in ((None, p), (p, z)):  # uniformity, alignment
            centre = torch.eye(n, device=z.device) - 1 / n
            weight = eye if left is None else left.T @ centre @ left / n + eye
            step = right.T @ centre @ z / n
            power, log = step, torch.zeros_like(step)
            for k in range(1, 5):
                log = log + (-1) ** (k + 1) / k * power
                power = power @ step
            loss = loss - torch.trace(weight @ log) / 2
    return torch.cat(torch.autograd.grad(loss, (z0, z1)))


def _ours_matrix_ssl(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(matrix_ssl_loss(z0, z1, p0, p1), (z0, z1)))


def _plain_mec(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """Compute the loss from the N x N matrix and its powers, with one product per power."""
    n = z0.shape[0]
    loss = z0.new_zeros(())
    for z, p in ((z0, p1), (z1, p0)):
        step = F.normalize(p, dim=1) @ F.normalize(z, dim=1).T / (n * MEC_EPS)
        power, log = step, step
        for k in range(2, 5):
            power = power @ step
            log = log + (-1) ** (k + 1) / k * power
        loss = loss - MEC_EPS * torch.trace(log) / 2
    return torch.cat(torch.autograd.grad(loss, (z0, z1)))


def _ours_mec(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(mec_loss(z0, z1, p0, p1, eps_d=MEC_EPS), (z0, z1)))


@torch.no_grad()
def _plain_predictor(z: Tensor) -> Tensor:
    """Update a zero moment once and compute W, and its square root, which the published loss needs."""
    scaled = z / z.shape[0] ** 0.5
    moment = 0.998 * torch.zeros(z.shape[1], z.shape[1], device=z.device) + 0.002 * scaled.T @ scaled
    values, vectors = torch.linalg.eig(moment)
    values, vectors = values.real.clamp_min(0), vectors.real
    powered = (values / values.max()) ** 0.5
    root = vectors @ powered.sqrt().diag() @ vectors.T
    return vectors @ powered.diag() @ vectors.T + 0 * root[0, 0]


@torch.no_grad()
def _ours_predictor(z: Tensor) -> Tensor:
    predictor = ClosedFormPredictor(z.shape[1], alpha=0.5).to(z.device)
    predictor.update(z)
    return predictor.W


def _heads(views: tuple[int, int], rows: int, width: int, device: str) -> list[Tensor]:
    """Return the outputs of a teacher head and of a student head, with the rows of all views concatenated."""
    generator = torch.Generator().manual_seed(0)
    outputs = (torch.randn(count * rows, width, generator=generator) for count in views)
    return [output.to(device).requires_grad_() for output in outputs]


def _plain_dissl(views: tuple[int, int], teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    """Compute the loss with the statistics that the published code logs at every step."""
    scaled = teacher.float() / 0.5
    every_p, every_log_p = (f(scaled, dim=-1).chunk(views[0]) for f in (F.softmax, F.log_softmax))
    every_log_q = F.log_softmax(student.float() / 1.0, dim=-1).chunk(views[1])
    distillation, invariance, entropies, logged = [], [], [], []
    for t, p in enumerate(every_p):
        entropies.append(torch.distributions.Categorical(probs=p.mean(0)).entropy())
        for u, log_p in enumerate(every_log_p):
            if u != t:
                invariance.append(-(p * log_p).sum(-1).mean())
        for s, log_q in enumerate(every_log_q):
            if s == t:
                logged.append(-(p.detach() * log_q.detach()).sum(-1).mean())
            else:
                distillation.append(-(p * log_q).sum(-1).mean())
    logged.append(torch.distributions.Categorical(probs=torch.cat(every_p).detach()).entropy().mean())
    parts = [torch.stack(each).mean() for each in (distillation, entropies, invariance)]
    return torch.autograd.grad(parts[0] - 2.3 * parts[1] + 0.8 * parts[2], (teacher, student))


def _ours_dissl(views: tuple[int, int], teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    outputs = (output.unflatten(0, (count, -1)) for output, count in zip((teacher, student), views, strict=True))
    return torch.autograd.grad(dissl_loss(*outputs), (teacher, student))


def _plain_cissl(views: int, teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    rows = len(student)
    logits = (F.normalize(student, dim=1) @ F.normalize(teacher, dim=1).T).float() / 0.07
    own = torch.eye(rows // views, device=student.device).bool().repeat(views, views)
    log_q = logits.log_softmax(-1)[own].view(rows, views)
    return torch.autograd.grad((-log_q.sum(1) / views).mean(), (teacher, student))


def _ours_cissl(views: int, teacher: Tensor, student: Tensor) -> tuple[Tensor, ...]:
    loss = cissl_loss(student.unflatten(0, (views, -1)), teacher.unflatten(0, (views, -1)))
    return torch.autograd.grad(loss, (teacher, student))


IMAGES, NEGATIVES = 50_000, 4096
"""Rows of PIRL's bank, and negatives of each image."""


def _memory(rows: int, width: int, device: str) -> list[Tensor]:
    """Return the outputs for images and patches, the positions of the images, the bank and the negatives."""
    index = torch.arange(rows, device=device)
    bank = IndexedBank(IMAGES, width).to(device)
    return [*_views(rows, width, device), index, bank.rows, draw_negatives(index, IMAGES, NEGATIVES)]


def _plain_pirl(image: Tensor, patches: Tensor, index: Tensor, bank: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
    """Compute InfoNCE with gathered rows of the bank, as the published code."""
    places = torch.cat([index[:, None], negatives], 1)
    loss = image.new_zeros(())
    for z in (patches, image):
        weight = bank.index_select(0, places.flatten()).view(*places.shape, -1)
        logits = torch.bmm(weight, F.normalize(z, dim=1).unsqueeze(2)).squeeze(2) / 0.1
        loss = loss + F.cross_entropy(logits, torch.zeros_like(index)) / 2
    return torch.autograd.grad(loss, (image, patches))


def _ours_pirl(image: Tensor, patches: Tensor, index: Tensor, bank: Tensor, negatives: Tensor) -> tuple[Tensor, ...]:
    memory = IndexedBank(None, bank.shape[1])
    memory.rows = bank
    return torch.autograd.grad(pirl_loss(image, patches, index, memory, negatives=negatives), (image, patches))


def _plain_relic(q0: Tensor, q1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    """Compute the loss from N x N matrices."""
    pairs = [[F.normalize(z, dim=1) for z in pair] for pair in ((q0, t1), (q1, t0))]
    first, second = ((q @ t.T / 0.2).log_softmax(1) for q, t in pairs)
    contrastive = -(first.diagonal().mean() + second.diagonal().mean()) / 2
    invariance = F.kl_div(second, first.detach(), log_target=True, reduction="batchmean")
    return torch.cat(torch.autograd.grad(contrastive + invariance, (q0, q1)))


def _ours_relic(q0: Tensor, q1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(relic_loss([q0, q1], [t0, t1]), (q0, q1)))


def _crops(count: int) -> Callable[[int, int, str], list[Tensor]]:
    """Return rows of that many student views and of two teacher views."""

    def make(rows: int, width: int, device: str) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(rows, width, generator=generator)
        views = [common + torch.randn(rows, width, generator=generator) for _ in range(count + 2)]
        return [view.to(device).requires_grad_(number < count) for number, view in enumerate(views)]

    return make


def _plain_simdino(*views: Tensor) -> Tensor:
    """Compute all cosines of unit rows at once, and the determinants of D x D matrices with autograd."""
    student, teacher = (F.normalize(torch.stack(part), dim=-1) for part in (views[:-2], views[-2:]))
    rows, width = views[0].shape
    cosines = F.cosine_similarity(teacher[:, None], student[None], dim=-1).mean(2)
    different = 1 - torch.eye(2, len(student), device=student.device)
    spread = (student[:2] + teacher) / 2
    identity = torch.eye(width, device=student.device)
    factors = torch.linalg.cholesky(identity + width / (rows * 0.05) * spread.mT @ spread)
    rate = factors.diagonal(dim1=1, dim2=2).log().sum(1).mean()
    loss = -(cosines * different).sum() / different.sum() - (width + rows) / (width * rows) * rate
    return torch.cat(torch.autograd.grad(loss, views[:-2]))


def _ours_simdino(*views: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(simdino_loss(views[:-2], views[-2:]), views[:-2]))


LOCATIONS = 49
"""Locations of AMDIM's target map."""


def _map(rows: int, width: int, device: str) -> list[Tensor]:
    """Return a source and a target map, of scores about 1."""
    generator = torch.Generator().manual_seed(0)
    source, noise = (torch.randn(rows, width, count, generator=generator) for count in (1, LOCATIONS))
    return [x.to(device).requires_grad_() for x in (source.squeeze(2), (source + noise) / 2)]


def _plain_amdim(source: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Compute the loss from the scores of all images at all locations, with products of masks as the published code."""
    rows, width, locations = target.shape
    scores = (source @ target.transpose(0, 1).reshape(width, -1)).view(rows, rows, locations) / width**0.5
    regularizer = 0.05 * (scores**2).mean()
    clipped = 20 * torch.tanh(scores / 20)
    own = torch.eye(rows, device=source.device)[:, :, None].expand_as(clipped)
    others = 1 - own
    positive = (own * clipped).sum(1)
    negatives = others * clipped - 20 * own  # the least possible score in place of the own one
    top = negatives.flatten(1).amax(1).detach()[:, None]
    mass = (others * torch.exp(negatives - top[:, :, None])).sum((1, 2))[:, None]
    log_share = positive - top - torch.log(torch.exp(positive - top) + mass)
    return torch.autograd.grad(regularizer - log_share.mean(), (source, target))


def _ours_amdim(source: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(amdim_nce(source, target).loss, (source, target))


DRAWN = 1024
"""Directions of LeJEPA."""


def _views_and_directions(rows: int, width: int, device: str) -> list[Tensor]:
    directions = F.normalize(torch.randn(DRAWN, width, generator=torch.Generator().manual_seed(1)), dim=1)
    return [*_views(rows, width, device), directions.to(device)]


def _plain_lejepa(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """Compute the loss from the cosines and sines at all knots, for each row and direction."""
    z, t = torch.stack([x, y]), torch.linspace(0, 5, 17, device=x.device)
    normal = torch.exp(-t.square() / 2)
    phase = (z @ directions.T).unsqueeze(3) * t
    error = (phase.cos().mean(1) - normal).square() + phase.sin().mean(1).square()
    sigreg = 2 * len(x) * torch.trapezoid(error * normal, t).mean()
    loss = 0.95 * (z - z.mean(0)).square().mean() + 0.05 * sigreg
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _ours_lejepa(x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(lejepa_loss([x, y], directions), (x, y)))


PROJECTED = 8192
"""Directions of Rectified LpJEPA."""


def _rectified_views(rows: int, width: int, device: str) -> list[Tensor]:
    """Return two views, directions and targets, as Rectified LpJEPA draws them."""
    loss = RectifiedLpJEPALoss(num_projections=PROJECTED)
    views = [view.detach().relu().requires_grad_() for view in _views(rows, width, device)]
    return [*views, *(drawn.to(device) for drawn in loss.draw(rows, width, 0, torch.zeros(())))]


def _plain_rectified_lpjepa(x: Tensor, y: Tensor, directions: Tensor, targets: Tensor) -> Tensor:
    """Sort all projections of each view and of the targets along the rows, as the published code does."""
    loss = 25 * F.mse_loss(x, y)
    for z in (x, y):
        found, wanted = ((rows @ directions.T).sort(0).values for rows in (z, targets))
        loss = loss + 125 * (found - wanted).square().mean() / 2
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _ours_rectified_lpjepa(x: Tensor, y: Tensor, directions: Tensor, targets: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(rectified_lpjepa_loss([x, y], directions, targets), (x, y)))


GRID, OFFSETS, DIRECTIONS = 7, (2, 3, 4, 5, 6), 4
"""Patches per side, predicted offsets and directions of CPC."""


def _grids(rows: int, width: int, device: str) -> list[Tensor]:
    """Return the targets and the predictions of each offset, in each direction, as CPC's head makes them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, DIRECTIONS, width, GRID - k, GRID) for k in (0, *OFFSETS)]
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def _plain_cpc(targets: Tensor, *predictions: Tensor) -> tuple[Tensor, ...]:
    """Compute the matrix of the scores of each offset and direction by itself."""
    images = GRID**2 * torch.arange(len(targets), device=targets.device)[:, None]
    losses = []
    for direction in range(DIRECTIONS):
        columns = targets[:, direction].flatten(2).transpose(1, 2).flatten(0, 1)
        for k, of_offset in zip(OFFSETS, predictions, strict=True):
            rows = of_offset[:, direction].flatten(2).transpose(1, 2).flatten(0, 1)
            labels = (images + torch.arange(k * GRID, GRID**2, device=targets.device)).flatten()
            losses.append(F.cross_entropy(0.1 * rows @ columns.T, labels))
    return torch.autograd.grad(torch.stack(losses).mean(), (targets, *predictions))


def _ours_cpc(targets: Tensor, *predictions: Tensor) -> tuple[Tensor, ...]:
    pairs = [
        ({k: each[:, turn] for k, each in zip(OFFSETS, predictions, strict=True)}, targets[:, turn])
        for turn in range(DIRECTIONS)
    ]
    return torch.autograd.grad(cpc_terms(pairs).loss, (targets, *predictions))


def _lightly_barlow_twins(x: Tensor, y: Tensor) -> Tensor:
    from lightly.loss import BarlowTwinsLoss

    loss = BarlowTwinsLoss(lambda_param=0.0051).forward(x, y)  # a hook of the operation counter accepts no module here
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _ours_barlow_twins(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(barlow_twins_loss(x, y), (x, y)))


def _lightly_vicreg(x: Tensor, y: Tensor) -> Tensor:
    from lightly.loss import VICRegLoss

    return torch.cat(torch.autograd.grad(VICRegLoss().forward(x, y), (x, y)))


def _ours_vicreg(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(vicreg_loss(x, y), (x, y)))


def _plain_i_vne(x: Tensor, y: Tensor) -> Tensor:
    """Compute the entropies from singular values, as the published code."""
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    loss = -4.16 * F.cosine_similarity(x, y).mean()
    for z in (u, v):
        values = torch.svd(z / len(z) ** 0.5)[1].square()
        loss = loss + (values * values.log()).nansum() / 2
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _solvers_i_vne(rows: int, width: int) -> tuple[float, float]:
    """Count the operations of two singular value decompositions with vectors, and of two eigendecompositions."""
    small, big = sorted((rows, width))
    return 2 * (6 * big * small**2 + 20 * small**3), 2 * SYMMETRIC_EIG * small**3


def _ours_i_vne(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(i_vne_loss(x, y), (x, y)))


def _plain_corinfomax(x: Tensor, y: Tensor) -> Tensor:
    """Update the first state and take the log-determinants by autograd; a float64 state promotes, as published."""
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    eye = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    loss = 250 * F.mse_loss(u, v)
    for z in (u, v):
        mean = 0.01 * torch.zeros_like(eye[0]) + 0.99 * z.mean(0)
        covariance = 0.01 * eye + 0.99 * (z - mean).T @ (z - mean) / len(z)
        loss = loss - torch.logdet(covariance + 1e-8 * eye) / len(eye)
    return torch.cat(torch.autograd.grad(loss, (x, y)))


def _solvers_corinfomax(rows: int, width: int) -> tuple[float, float]:
    """Count the operations of two LU decompositions and inverses, and of two Cholesky decompositions and inverses."""
    return 2 * 8 / 3 * width**3, 2 * width**3


def _ours_corinfomax(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(corinfomax_loss(x, y), (x, y)))


def _scores(rows: int, width: int, device: str) -> list[Tensor]:
    """Return cosines of random rows with random prototypes, in 128 dimensions."""
    generator = torch.Generator().manual_seed(0)
    unit, prototypes = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (rows, width))
    return [(unit @ prototypes.T).to(device)]


def _plain_codes(scores: Tensor) -> Tensor:
    """Scale the matrix itself in each iteration, in place, as the published code does; no gradient passes."""
    q = torch.exp(scores / 0.05).T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= rows
    return (q * rows).T


def _ours_codes(scores: Tensor) -> Tensor:
    return sinkhorn_codes(scores, epsilon=0.05, iterations=3)


LAMBDA, TOLERANCE = 25.0, 1e-5


def _log_probabilities(rows: int, width: int, device: str) -> list[Tensor]:
    """Return the class probabilities of clustered rows, far from balanced."""
    generator = torch.Generator().manual_seed(0)
    h, w = torch.randn(rows, 16, generator=generator), torch.randn(16, width, generator=generator)
    return [(0.5 * h @ w).log_softmax(1).to(device)]


def _plain_balanced_labels(log_probabilities: Tensor) -> Tensor:
    """Iterate in float64 on the power of the probabilities, which is computed once, as published."""
    power = (LAMBDA * log_probabilities.double()).exp()
    n, classes = power.shape
    columns, error, iteration = power.new_full((n,), 1 / n), math.inf, 0
    while error > TOLERANCE:
        rows = 1 / (classes * (columns @ power))
        new = 1 / (n * (power @ rows))
        if iteration % 10 == 0:
            error = float((columns / new - 1).abs().mean())
        columns, iteration = new, iteration + 1
    return (power * rows).argmax(1)


def _log_balanced_labels(log_probabilities: Tensor) -> Tensor:
    """Iterate in float64 on the logarithms of the factors, which do not underflow as the power does."""
    x = LAMBDA * log_probabilities.double()
    n, classes = x.shape
    g, error, iteration = x.new_full((n,), -math.log(n)), math.inf, 0
    while error > TOLERANCE:
        f = -math.log(classes) - (x + g[:, None]).logsumexp(0)
        new = -math.log(n) - (x + f).logsumexp(1)
        if iteration % 10 == 0:
            error = float((g - new).expm1().abs().mean())
        g, iteration = new, iteration + 1
    return (x + f).argmax(1)


def _ours_balanced_labels(log_probabilities: Tensor) -> Tensor:
    return balanced_labels(log_probabilities, lamb=LAMBDA, tol=TOLERANCE)


def _clustered(rows: int, width: int, device: str) -> list[Tensor]:
    """Return rows and first centroids."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(128, width, generator=generator)
    x = centres[torch.randint(128, (rows,), generator=generator)] + torch.randn(rows, width, generator=generator)
    return [x.to(device), x[: min(128, rows // 8)].to(device)]


def _unclustered(rows: int, width: int, device: str) -> list[Tensor]:
    """Return directions without clusters, and first centroids."""
    x = F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), dim=1)
    return [x.to(device), x[: min(500, rows // 40)].to(device)]


def _plain_kmeans(x: Tensor, init: Tensor) -> Tensor:
    """Compute all distances, and the mean of each cluster by itself, as in the code of DeepCluster v2."""
    centroids = init.clone()
    for _ in range(20):
        labels = torch.cdist(x, centroids).argmin(1)
        for k in range(len(centroids)):
            members = labels == k
            if bool(members.any()):
                centroids[k] = x[members].mean(0)
    return torch.cdist(x, centroids).argmin(1)


def _faiss_kmeans(x: Tensor, init: Tensor) -> Tensor:
    faiss = importlib.import_module("faiss")
    clustering = faiss.Clustering(x.shape[1], len(init))
    clustering.niter, clustering.max_points_per_centroid = 20, 10**7
    faiss.copy_array_to_vector(init.numpy().ravel(), clustering.centroids)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index, rows = faiss.IndexFlatL2(x.shape[1]), x.numpy()
    clustering.train(rows, index)
    return torch.from_numpy(index.search(rows, 1)[1][:, 0])


def _ours_kmeans(x: Tensor, init: Tensor) -> Tensor:
    return kmeans(x, len(init), iterations=20, init=init).labels


def _view_cases() -> dict[str, Case]:
    """Return the cases of DISSL (2 teacher views) and CISSL (as many teacher views as student views).

    The number in the name is the number of student views.
    """
    cases = {}
    for count in (2, 8):
        cases[f"dissl_{count}"] = Case(
            partial(_heads, (2, count)),
            partial(_plain_dissl, (2, count)),
            partial(_ours_dissl, (2, count)),
            sizes=((256, 16384), (2560, 16384)),
            work=lambda rows, width: rows * width,
        )
        cases[f"cissl_{count}"] = Case(
            partial(_heads, (count, count)),
            partial(_plain_cissl, count),
            partial(_ours_cissl, count),
            sizes=((256, 128), (1024, 128)),
            work=lambda rows, width: rows**2 * width,
        )
    return dict(sorted(cases.items()))


LOSSES = {
    "ssl_ey": Case(_views, _plain_ssl_ey, _ours_ssl_ey),
    "byol": Case(_views, _plain_byol, _ours_byol),
    "isoloss": Case(_predicted_views, _plain_isoloss, _ours_isoloss),
    "i_vne": Case(
        _views, _plain_i_vne, _ours_i_vne, _solvers_i_vne, sizes=((64, 256), (256, 256), (1024, 256), (256, 2048))
    ),
    "corinfomax": Case(
        _views,
        _plain_corinfomax,
        _ours_corinfomax,
        _solvers_corinfomax,
        sizes=((512, 64), (1024, 128), (1536, 512)),
    ),
    "matrix_ssl": Case(_four_views, _plain_matrix_ssl, _ours_matrix_ssl, sizes=WIDE_AND_TALL),
    "mec": Case(_four_views, _plain_mec, _ours_mec, sizes=WIDE_AND_TALL),
    "simdino": Case(_crops(12), _plain_simdino, _ours_simdino, sizes=((64, 256), (512, 256), (1024, 256))),
    "amdim": Case(
        _map,
        _plain_amdim,
        _ours_amdim,
        sizes=((128, 512), (480, 512), (480, 1024)),
        work=lambda rows, width: rows**2 * width,
    ),
    "cpc": Case(_grids, _plain_cpc, _ours_cpc, sizes=((16, 64), (128, 64)), work=lambda rows, width: rows**2 * width),
    "pirl": Case(
        _memory, _plain_pirl, _ours_pirl, sizes=((32, 128), (256, 128)), work=lambda rows, width: rows * width
    ),
    "swav_codes": Case(
        _scores,
        _plain_codes,
        _ours_codes,
        sizes=((256, 3000), (4096, 3000)),
        work=lambda rows, width: rows * width,
    ),
    "lejepa": Case(
        _views_and_directions,
        _plain_lejepa,
        _ours_lejepa,
        sizes=((256, 128), (1024, 128)),
        work=lambda rows, width: rows * (width + 100),
    ),
    "rectified_lpjepa": Case(
        _rectified_views,
        _plain_rectified_lpjepa,
        _ours_rectified_lpjepa,
        sizes=((256, 512), (128, 2048)),
        work=lambda rows, width: rows * (width + 100),
    ),
    "balanced_labels": Case(
        _log_probabilities,
        _plain_balanced_labels,
        _ours_balanced_labels,
        sizes=((5000, 128), (50000, 128)),
        work=lambda rows, width: rows * width,
    ),
    "kmeans": Case(
        _clustered,
        _plain_kmeans,
        _ours_kmeans,
        sizes=((5000, 64), (50000, 256)),
        work=lambda rows, width: rows * width,
    ),
    **_view_cases(),
    "relic": Case(
        _four_views,
        _plain_relic,
        _ours_relic,
        sizes=((256, 128), (256, 256), (1024, 256), (4096, 256)),
        work=lambda rows, width: rows**2 * width,
    ),
}
LOSSES["balanced_labels_log"] = LOSSES["balanced_labels"]._replace(plain=_log_balanced_labels, sizes=((5000, 128),))
if importlib.util.find_spec("lightly") is not None:
    sizes = ((256, 512), (256, 2048), (1024, 512), (2048, 1024))
    LOSSES["barlow_twins"] = Case(_views, _lightly_barlow_twins, _ours_barlow_twins, sizes=sizes)
    LOSSES["vicreg"] = Case(_views, _lightly_vicreg, _ours_vicreg, sizes=sizes)
if importlib.util.find_spec("faiss") is not None:
    LOSSES["kmeans_faiss"] = LOSSES["kmeans"]._replace(plain=_faiss_kmeans)
    LOSSES["kmeans_faiss_unclustered"] = LOSSES["kmeans_faiss"]._replace(
        make=_unclustered, sizes=((5000, 64), (20000, 128), (50000, 64))
    )
PREDICTORS = {
    "closed_form_predictor": Case(
        _moments,
        _plain_predictor,
        _ours_predictor,
        lambda rows, width: (GENERAL_EIG * width**3, SYMMETRIC_EIG * width**3),
    )
}


def compare(name: str, rows: int, width: int, *, device: str = "cpu", repeat: int = 7, budget: float = 60) -> Result:
    """Run one case.

    Args:
        name: a key of LOSSES or PREDICTORS.
        rows: N.
        width: D.
        device: "cpu" or "cuda".
        repeat: number of timed, interleaved rounds, after one untimed round that warms up and counts operations.
        budget: seconds after which no further timed round starts; the first round always runs.
    """
    case = CASES[name]
    inputs = case.make(rows, width, device)
    begin = time.perf_counter()
    (plain, *plain_counts), (ours, *ours_counts) = (_counted(f, inputs, device) for f in (case.plain, case.ours))
    pairs = zip(tree_leaves(plain), tree_leaves(ours), strict=True)
    difference = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    del plain, ours, pairs
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeat):
        for function, times in zip((case.plain, case.ours), seconds, strict=True):
            _wait(device)
            start = time.perf_counter()
            function(*inputs)
            _wait(device)
            times.append(time.perf_counter() - start)
        if time.perf_counter() - begin > budget:
            break
    plain_seconds, ours_seconds = (statistics.median(times) for times in seconds)
    plain_flops, ours_flops = (
        c[0] + e for c, e in zip((plain_counts, ours_counts), case.extra_flops(rows, width), strict=True)
    )
    return Result(
        case=name,
        rows=rows,
        width=width,
        plain_seconds=plain_seconds,
        ours_seconds=ours_seconds,
        time_ratio=statistics.median(a / b for a, b in zip(*seconds, strict=True)),
        flop_ratio=plain_flops / ours_flops if plain_flops and ours_flops else None,
        plain_bytes=plain_counts[1],
        ours_bytes=ours_counts[1],
        difference=difference,
    )


class LiveBytes(TorchDispatchMode):
    """Track the storages that operators return until they are freed; ``peak`` is the largest total size in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, int]] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        # the storages of inputs are not new, and those of views and in-place operators are already tracked; so are the
        # parts of a sparse matrix
        given = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        for leaf in tree_leaves(returned):
            if _has_storage(leaf):
                storage = leaf.untyped_storage()
                if id(storage) not in self.live and id(storage) not in given:
                    self._follow(storage)
        return returned

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def freed(_: Any) -> None:
            del self.live[key]
            self.held -= size

        self.live[key] = (weakref.ref(storage, freed), size)
        self.held += size
        self.peak = max(self.peak, self.held)


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def _counted(function: Callable[..., Any], inputs: Sequence[Tensor], device: str) -> tuple[Any, int, int]:
    """Return the result, the operations in matrix products, and the peak memory in bytes without the inputs."""
    live = LiveBytes()
    with live, FlopCounterMode(display=False) as flops:
        result = function(*inputs)
    _wait(device)
    return result, flops.get_total_flops(), live.peak


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


CASES = {**LOSSES, **PREDICTORS}
COLUMNS = "{:<22}{:>6}{:>6}{:>12}{:>12}{:>9}{:>9}{:>11}{:>10}"


def _row(result: Result) -> str:
    return COLUMNS.format(
        result.case,
        result.rows,
        result.width,
        f"{1e3 * result.plain_seconds:.2f}",
        f"{1e3 * result.ours_seconds:.2f}",
        f"{result.time_ratio:.1f}x",
        "-" if result.flop_ratio is None else f"{result.flop_ratio:.1f}x",
        f"{result.plain_bytes / 1e6:.1f}",
        f"{result.ours_bytes / 1e6:.1f}",
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None or int(match[1]) < 2 or int(match[2]) < 1:
        raise argparse.ArgumentTypeError(f"must be ROWSxWIDTH with at least 2 rows, like 256x512, got {text!r}")
    return int(match[1]), int(match[2])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m plugins.experiments.bench",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="COMMAND --help lists the options of a command.",
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")
    for name, text in {
        "losses": "each loss and the plain published formula",
        "predictors": "the closed-form predictor and the general eigensolver",
        "all": "losses and predictors",
    }.items():
        command = commands.add_parser(name, help=text, description=f"Time and memory of {text}.")
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--sizes", nargs="+", type=_size, metavar="NxD", help="rows x width, such as 256x512")
        command.add_argument(
            "--case", nargs="+", metavar="NAME", help="only these, such as ssl_ey byol; * stands for any text"
        )
        least = integer_from(1)
        command.add_argument("--repeat", type=least, default=7, help="number of timed rounds (default: %(default)s)")
        command.add_argument("--quick", action="store_true", help="only sizes that take a few seconds")
        command.add_argument("--budget", type=float, default=600, help="seconds for all cases (default: %(default)s)")
    text = "a complete training step of each method and of solo-learn's methods"
    first, *_, last = (bench_step.__doc__ or "").split("\n\n")
    bench_step.add_options(commands.add_parser("step", help=text, description=f"{first} {last}"))
    text = "images per second of DALI and of the standard loader"
    bench_data.add_options(commands.add_parser("data", help=text, description=f"{text.capitalize()}."))
    for command in commands.choices.values():
        command.add_argument(
            "--json", type=Path, metavar="FILE", help="also write the results and the environment to this file"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible to torch")
    run = {"step": bench_step.run, "data": bench_data.run}.get(options.what, _run)
    if run is _run:
        _check_cases(parser, options)
    environment, results = run(options)
    if options.json is not None:
        environment["machine"] = platform.machine()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")
    return 0


def _check_cases(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    known = {"losses": LOSSES, "predictors": PREDICTORS, "all": CASES}[options.what]
    for pattern in options.case or ():
        if not fnmatch.filter(known, pattern):
            parser.error(f"--case: no case of {options.what} matches {pattern!r}; the cases are {', '.join(known)}")


def _run(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Print the table of losses and predictors, and return the environment and the results."""
    jobs = []
    if options.what in ("losses", "all"):
        sizes = options.sizes or (QUICK_SIZES if options.quick else SIZES)
        jobs += [(n, *size) for size in sizes for n, case in LOSSES.items() if options.sizes or not case.sizes]
        if not options.sizes:
            of_own = {n: case.sizes[:1] if options.quick else case.sizes for n, case in LOSSES.items()}
            jobs += [(n, *size) for n, sizes in of_own.items() for size in sizes]
    if options.what in ("predictors", "all"):
        jobs += [(n, *size) for size in options.sizes or PREDICTOR_SIZES for n in PREDICTORS]
    if options.case:
        jobs = [job for job in jobs if any(fnmatch.fnmatchcase(job[0], pattern) for pattern in options.case)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    print(f"torch {torch.__version__}, {device}; medians of forward and backward; floor: ratio of operation counts")
    header = ("case", "N", "D", "plain ms", "ours ms", "faster", "floor", "plain MB", "ours MB")
    print(COLUMNS.format(*header), flush=True)
    begin = time.perf_counter()
    results: list[Result] = []
    for name, rows, width in jobs:
        left = options.budget - (time.perf_counter() - begin)
        needed = _expected_seconds(name, rows, width, results)
        if needed > left:
            print(
                f"{name:<22}{rows:>6}{width:>6}   skipped: needs {needed:.0f} s, {max(left, 0):.0f} s of --budget left"
            )
            continue
        result = compare(name, rows, width, device=options.device, repeat=options.repeat, budget=left / 4)
        results.append(result)
        print(_row(result), flush=True)
    return {"torch": torch.__version__, "device": device}, [r._asdict() for r in results]


def _expected_seconds(name: str, rows: int, width: int, results: Sequence[Result]) -> float:
    """Estimate the seconds of two rounds from the last result of the case; 0 if there is none."""
    last = next((r for r in reversed(results) if r.case == name), None)
    if last is None:
        return 0
    growth = CASES[name].work(rows, width) / CASES[name].work(last.rows, last.width)
    return 2 * growth * (last.plain_seconds + last.ours_seconds)


if __name__ == "__main__":
    sys.exit(main())
