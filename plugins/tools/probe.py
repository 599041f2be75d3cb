"""Probes of frozen features, as the TinyImageNet code of DISSL fits them (Dubois et al. 2022, arXiv:2209.06235).

A probe is a linear classifier or an MLP, trained with SGD on features that were computed once. The published code tries
several weight decays and reports the best accuracy on the test images. Here a part of the training labels is held out,
the weight decay is chosen there, and what is reported is the accuracy on the test images of a probe with that weight
decay, fitted to all training labels; the published way is an option, and every result names which way was taken.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from plugins.checks import check_choice, check_range
from plugins.heads.dissl import issl_head

HIDDEN_LAYERS = {"linear": 0, "mlp": 2}
"""Kinds of probes, and their hidden layers (Linear, BatchNorm, ReLU)."""
SELECT = ("validation", "test")
"""What a weight decay is chosen on: a held-out part of the training labels, or, as published, the test images."""


class Probe(NamedTuple):
    """What is fitted and how: SGD with momentum 0.9 and L2 weight decay on everything, cosine schedule to 0.

    Args:
        kind: "linear" or "mlp".
        weight_decay: values to choose from, each >= 0; of one nothing is chosen.
        fraction: part of the training labels that are used, in (0, 1]; of each class its share.
        hidden_dim: width of the MLP's two hidden layers.
        holdout: part of these labels on which a weight decay is chosen, in (0, 1).
        lr: learning rate of the first epoch, > 0.
        epochs: >= 1.
        batch_size: >= 2; there may be fewer rows.
    """

    kind: str = "linear"
    weight_decay: tuple[float, ...] = (1e-4, 1e-5, 1e-6)
    fraction: float = 1.0
    hidden_dim: int = 2048
    holdout: float = 0.1
    lr: float = 0.6
    epochs: int = 100
    batch_size: int = 512

    def check(self) -> None:
        """Raise ValueError where a value is out of its range."""
        check_choice("kind", self.kind, tuple(HIDDEN_LAYERS))
        if not self.weight_decay:
            raise ValueError("weight_decay must name at least one value")
        for value in self.weight_decay:
            check_range("weight_decay", value, low=0)
        for name in ("fraction", "holdout", "lr"):
            value = getattr(self, name)
            if not 0 < value < (math.inf if name == "lr" else 1) and (name, value) != ("fraction", 1):
                raise ValueError(f"{name} must be {_RANGES[name]}, got {value!r}")
        check_range("hidden_dim", self.hidden_dim, low=1)
        check_range("epochs", self.epochs, low=1)
        check_range("batch_size", self.batch_size, low=2)


_RANGES = {"fraction": "above 0 and at most 1", "holdout": "between 0 and 1", "lr": "above 0"}


def stratified(labels: Int[Tensor, "N"], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows drawn at random, as many of each class as its share, and the rows that remain.

    Args:
        labels: classes of all rows.
        count: rows to draw.
        seed: of the draw.

    Returns:
        Numbers of the drawn rows and of the others, both ascending.

    Raises:
        ValueError: there are fewer rows than classes on either side, or a class has a single row.
    """
    from sklearn.model_selection import train_test_split

    sizes = labels.unique(return_counts=True)[1]
    if min(count, len(labels) - count) < len(sizes) or sizes.min() < 2:
        raise ValueError(
            f"{count} of {len(labels)} labels cannot be drawn with a label of each of the {len(sizes)} classes "
            "among them and among the others"
        )
    rows = torch.arange(len(labels)).numpy()
    drawn, others = train_test_split(rows, train_size=count, stratify=labels.cpu().numpy(), random_state=seed)
    return torch.as_tensor(drawn).sort().values, torch.as_tensor(others).sort().values


def fit_probe(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
    classes: int,
    probe: Probe,
    *,
    weight_decay: float,
    seed: int,
) -> nn.Module:
    """Train a probe on the device of the features.

    Args:
        features: of the frozen backbone.
        labels: their classes, in [0, classes).
        classes: how many there are.
        probe: kind and training.
        weight_decay: >= 0.
        seed: of its first weights and of the order of the rows.

    Returns:
        The probe, in evaluation mode: ``[N, D]`` → ``[N, classes]``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = HIDDEN_LAYERS[probe.kind]
        model = issl_head(features.shape[1], classes, layers=layers, hidden_dim=probe.hidden_dim)
        model.to(features.device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=probe.lr, momentum=0.9, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, probe.epochs)
        for _ in range(probe.epochs):
            batches = torch.randperm(len(features)).to(features.device).split(probe.batch_size)
            # one row alone has no batch statistics
            for rows in batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]:
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(features[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, features: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> tuple[float, float]:
    """Per cent of the rows whose class is the first, and among the first five, of the model's scores."""
    hits = torch.zeros(2, dtype=torch.int64)
    for rows, wanted in zip(features.split(8192), labels.split(8192), strict=True):
        scores = model(rows)
        best = scores.topk(min(5, scores.shape[1])).indices == wanted[:, None]
        hits += torch.stack([best[:, :1].sum(), best.sum()]).cpu()
    first, five = (hits * 100.0 / len(labels)).tolist()
    return first, five


def evaluate_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    probe: Probe,
    *,
    select: str = "validation",
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a probe with each weight decay to a part of the training labels, choose one, and report its test accuracy.

    Args:
        train: features ``[N, D]`` and classes ``[N]``.
        test: the same of the test images.
        probe: what is fitted and how.
        select: "validation": on a held-out part of the labels; "test": the best test accuracy, as published, which is
            no estimate of the accuracy on further images.
        seed: of the draws and of each fit.

    Returns:
        ``kind``, ``dim`` (D), ``fraction``, ``labels`` (how many were used), ``select`` ("nothing" for one weight
        decay); ``weight_decay``, ``acc1`` and ``acc5`` of the chosen one; ``grid``: for each weight decay ``acc1``
        and ``acc5`` on the test images and ``validation_acc1`` (None where none was held out). Accuracies in per cent.

    Raises:
        ValueError: a value out of its range, or too few labels to draw or to hold out.
    """
    check_choice("select", select, SELECT)
    probe.check()
    select = select if len(probe.weight_decay) > 1 else "nothing"
    classes = int(max(train[1].max(), test[1].max())) + 1
    features, labels = train
    count = round(probe.fraction * len(labels))
    if count < len(labels):
        rows = stratified(labels, count, seed)[0].to(labels.device)
        features, labels = features[rows], labels[rows]
    split = None
    if select == "validation":
        parts = stratified(labels, round((1 - probe.holdout) * len(labels)), seed + 1)
        split = [part.to(labels.device) for part in parts]

    grid = []
    for weight_decay in probe.weight_decay:
        how = {"weight_decay": weight_decay, "seed": seed}
        first, five = accuracy(fit_probe(features, labels, classes, probe, **how), *test)
        held = None
        if split is not None:
            kept, out = split
            model = fit_probe(features[kept], labels[kept], classes, probe, **how)
            held = accuracy(model, features[out], labels[out])[0]
        grid.append({"weight_decay": weight_decay, "acc1": first, "acc5": five, "validation_acc1": held})
    best = max(grid, key=lambda row: row["acc1" if split is None else "validation_acc1"])
    return {
        **{"kind": probe.kind, "dim": features.shape[1], "fraction": probe.fraction},
        **{"labels": len(labels), "select": select},
        **{key: best[key] for key in ("weight_decay", "acc1", "acc5")},
        "grid": grid,
    }
