"""Probes of frozen features, as in the code of DISSL (Dubois et al. 2022, arXiv:2209.06235).

A probe is a linear classifier or an MLP that is trained by gradient descent on precomputed features, or one of
scikit-learn's linear classifiers. The published code fits several settings and reports the best accuracy on the test
images. By default, this module chooses the setting on a held-out part of the training labels, fits a probe with it to
all training labels, and reports the accuracy of that probe on the test images. The published selection is an option.
Every result names the selection that was used.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from plugins.checks import check_choice, check_range
from plugins.heads.dissl import issl_head
from plugins.install import not_installed
from plugins.tools.probe_sklearn import CLASSIFIERS, draw_strengths, fit_classifier

HIDDEN_LAYERS = {"linear": 0, "mlp": 2, "amdim_linear": 0, "amdim_mlp": 1}
"""Kinds of probes that are trained by gradient descent, and their number of hidden layers (Linear, BatchNorm, ReLU).

Those of AMDIM (Bachman, Hjelm & Buchwalter 2019, arXiv:1906.00910) have a loss of their own, :func:`probe_loss`. Their
MLP has a dropout of 0.2 before each linear layer.
"""
KINDS = (*HIDDEN_LAYERS, *CLASSIFIERS)
OPTIMIZERS = ("sgd", "lars", "adamw")
SELECT = ("validation", "test")
"""Images for the choice of a setting: a held-out part of the training images or, as published, the test images."""


class Setting(NamedTuple):
    """Hyperparameters of a linear probe or an MLP.

    Args:
        weight_decay: >= 0; L2 on all parameters with "sgd", on matrices with "lars", decoupled with "adamw".
        lr: learning rate of the first epoch, > 0; a cosine schedule decreases it to 0.
        optimizer: "sgd" or "lars", both with momentum 0.9, or "adamw".
        normalized: whether a BatchNorm without scale and shift comes before the probe.
    """

    weight_decay: float = 1e-6
    lr: float = 0.6
    optimizer: str = "sgd"
    normalized: bool = False

    def check(self) -> None:
        """Raise a ValueError if a value is out of range."""
        check_range("weight_decay", self.weight_decay, low=0)
        _check_within("lr", self.lr)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)


class Probe(NamedTuple):
    """A probe and the settings to choose from.

    Args:
        kind: "linear", "mlp", "amdim_linear", "amdim_mlp", or one of scikit-learn's classifiers, "logistic" and "svc",
            on features in [0, 1].
        grid: settings of a linear probe or an MLP to choose from; a single setting is used without a choice.
        C: inverse regularisation strengths of scikit-learn's classifiers to choose from, each > 0.
        search: number of random values of C to use instead, log-uniform in [1e-4, 100].
        fraction: fraction of the training labels to use, in (0, 1], stratified by class.
        hidden_dim: width of the hidden layers of an MLP.
        holdout: fraction of these labels that is held out for the choice of a setting, in (0, 1).
        epochs: number of epochs, >= 1.
        batch_size: batch size, >= 2; may exceed the number of rows.
    """

    kind: str = "linear"
    grid: tuple[Setting, ...] = ()
    C: tuple[float, ...] = ()
    search: int = 0
    fraction: float = 1.0
    hidden_dim: int = 2048
    holdout: float = 0.1
    epochs: int = 100
    batch_size: int = 512

    def check(self) -> None:
        """Raise a ValueError if a value is out of range."""
        check_choice("kind", self.kind, KINDS)
        check_range("search", self.search, low=0)
        if self.kind in HIDDEN_LAYERS and (not self.grid or self.C or self.search):
            raise ValueError(f"a {self.kind} probe needs a grid of settings, and neither C nor search")
        if self.kind in CLASSIFIERS and (self.grid or bool(self.C) == bool(self.search)):
            raise ValueError(f"a {self.kind} probe needs either C or search, and no other setting")
        for setting in self.grid:
            setting.check()
        for value in self.C:
            _check_within("C", value)
        for name in ("fraction", "holdout"):
            _check_within(name, getattr(self, name))
        check_range("hidden_dim", self.hidden_dim, low=1)
        check_range("epochs", self.epochs, low=1)
        check_range("batch_size", self.batch_size, low=2)

    def settings(self, seed: int) -> list[dict[str, Any]]:
        """Return the settings to fit, in order; random values of C are drawn with ``seed``."""
        if self.kind in HIDDEN_LAYERS:
            return [setting._asdict() for setting in self.grid]
        return [{"C": value} for value in self.C or draw_strengths(self.search, seed)]


_RANGES = {"fraction": "above 0 and at most 1", "holdout": "between 0 and 1", "lr": "above 0", "C": "above 0"}


def _check_within(name: str, value: float) -> None:
    high = math.inf if name in ("lr", "C") else 1
    if not 0 < value < high and (name, value) != ("fraction", 1):
        raise ValueError(f"{name} must be {_RANGES[name]}, got {value!r}")


def stratified(labels: Int[Tensor, " N"], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split rows at random into two parts with the class proportions of all rows.

    Args:
        labels: classes of all rows.
        count: number of rows in the first part.
        seed: seed of the split.

    Returns:
        Indices of the rows of the two parts, both ascending.

    Raises:
        ValueError: a part has fewer rows than there are classes, or a class has a single row.
    """
    from sklearn.model_selection import train_test_split

    sizes = labels.unique(return_counts=True)[1]
    if min(count, len(labels) - count) < len(sizes) or sizes.min() < 2:
        raise ValueError(
            f"cannot split {len(labels)} labels into {count} and {len(labels) - count} with each of the {len(sizes)} "
            "classes in both parts; use a larger fraction"
        )
    rows = torch.arange(len(labels)).numpy()
    drawn, others = train_test_split(rows, train_size=count, stratify=labels.cpu().numpy(), random_state=seed)
    return torch.as_tensor(drawn).sort().values, torch.as_tensor(others).sort().values


def probe_loss(kind: str, logits: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy; for the probes of AMDIM that of ``10 tanh(x / 10)``, plus ``mean x² / 1000``.

    Args:
        kind: of the probe.
        logits: x, its outputs.
        labels: the classes.
    """
    if not kind.startswith("amdim_"):
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(10 * torch.tanh(logits / 10), labels) + 1e-3 * logits.square().mean()


def _probe(kind: str, width: int, classes: int, hidden_dim: int) -> nn.Sequential:
    """Build the classifier of a probe."""
    if kind != "amdim_mlp":
        return issl_head(width, classes, layers=HIDDEN_LAYERS[kind], hidden_dim=hidden_dim)
    hidden = nn.Linear(width, hidden_dim, bias=False)
    between = [nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Dropout(0.2)]
    return nn.Sequential(nn.Dropout(0.2), hidden, *between, nn.Linear(hidden_dim, classes))


def fit_probe(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    classes: int,
    probe: Probe,
    setting: Setting,
    *,
    seed: int,
) -> nn.Module:
    """Train a linear probe or an MLP on the device of the features.

    Args:
        features: features of the frozen backbone.
        labels: their classes, in [0, classes).
        classes: number of classes.
        probe: kind, number of epochs and batch size; its grid is ignored.
        setting: hyperparameters of the training.
        seed: seed of the initial weights and of the order of the rows.

    Returns:
        The probe, in evaluation mode: ``[N, D]`` → ``[N, classes]``.

    Raises:
        ValueError: "lars" without timm.
    """
    width = features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _probe(probe.kind, width, classes, probe.hidden_dim)
        if setting.normalized:
            model.insert(0, nn.BatchNorm1d(width, affine=False))
        model.to(features.device).train()
        optimizer = _optimizer(model, setting)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, probe.epochs)
        for _ in range(probe.epochs):
            batches = torch.randperm(len(features)).to(features.device).split(probe.batch_size)
            # a batch of one row has no batch statistics
            for rows in batches if len(batches) == 1 or len(batches[-1]) > 1 else batches[:-1]:
                optimizer.zero_grad(set_to_none=True)
                probe_loss(probe.kind, model(features[rows]), labels[rows]).backward()
                optimizer.step()
            schedule.step()
    return model.eval()


def _optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": setting.lr, "weight_decay": setting.weight_decay}
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **shared)
    shared["momentum"] = 0.9
    if setting.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), **shared)
    try:
        from timm.optim.lars import Lars
    except ModuleNotFoundError as error:
        raise ValueError(f"the optimizer lars needs timm: {not_installed(error.name or 'timm')}") from None
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    # always_adapt: LARS scales the step of a matrix also without weight decay; biases and norms are not scaled
    groups = [{"params": matrices, "always_adapt": True}, {"params": others, "weight_decay": 0.0}]
    return Lars([group for group in groups if group["params"]], trust_coeff=0.001, **shared)


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
) -> tuple[float, float]:
    """Return the top-1 and top-5 accuracy of a model in per cent."""
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
    track: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]] = iter,
) -> dict[str, Any]:
    """Fit a probe with each setting to a part of the training labels, choose one, and report its test accuracy.

    Args:
        train: features ``[N, D]`` and classes ``[N]`` of the training images.
        test: features and classes of the test images.
        probe: the probe and its settings.
        select: "validation" chooses on a held-out part of the labels. "test" chooses the best test accuracy, as
            published; that accuracy overestimates the accuracy on new images.
        seed: seed of the splits and of each fit.
        track: iterates over the settings, for example with a progress bar.

    Returns:
        ``kind``, ``dim`` (D), ``fraction``, ``labels`` (number of labels used), ``select`` (None for a single
        setting); the chosen setting (``C`` or the entries of :class:`Setting`) with ``acc1`` and ``acc5``; ``grid``:
        each setting with ``acc1`` and ``acc5`` on the test images and ``validation_acc1`` (None without held-out
        labels). Accuracies are in per cent.

    Raises:
        ValueError: a value is out of range, there are too few labels for a split, or a package is missing.
    """
    check_choice("select", select, SELECT)
    probe.check()
    settings = probe.settings(seed)
    selection = select if len(settings) > 1 else None
    classes = int(max(train[1].max(), test[1].max())) + 1
    features, labels = train
    count = round(probe.fraction * len(labels))
    if count < len(labels):
        rows = stratified(labels, count, seed)[0].to(labels.device)
        features, labels = features[rows], labels[rows]
    split = None
    if selection == "validation":
        parts = stratified(labels, round((1 - probe.holdout) * len(labels)), seed + 1)
        split = [part.to(labels.device) for part in parts]

    def fit(features: Tensor, labels: Tensor, setting: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        if probe.kind in CLASSIFIERS:
            return fit_classifier(probe.kind, features, labels, classes, C=setting["C"], seed=seed)
        return fit_probe(features, labels, classes, probe, Setting(**setting), seed=seed)

    grid = []
    for setting in track(settings):
        first, five = accuracy(fit(features, labels, setting), *test)
        held = None
        if split is not None:
            kept, out = split
            held = accuracy(fit(features[kept], labels[kept], setting), features[out], labels[out])[0]
        grid.append({**setting, "acc1": first, "acc5": five, "validation_acc1": held})
    best = max(grid, key=lambda row: row["acc1" if split is None else "validation_acc1"])
    return {
        **{"kind": probe.kind, "dim": features.shape[1], "fraction": probe.fraction},
        **{"labels": len(labels), "select": selection},
        **{key: value for key, value in best.items() if key != "validation_acc1"},
        "grid": grid,
    }


def describe(row: dict[str, Any]) -> str:
    """Describe the setting in a result of :func:`evaluate_probe`, or in an entry of its grid.

    >>> describe({**Setting(lr=0.1, normalized=True)._asdict(), "acc1": 93.0})
    'sgd, lr 0.1, weight decay 1e-06, normalized'
    >>> describe({"C": 0.5})
    'C 0.5'
    """
    if "C" in row:
        return f"C {row['C']:.3g}"
    normalized = ", normalized" if row["normalized"] else ""
    return f"{row['optimizer']}, lr {row['lr']:g}, weight decay {row['weight_decay']:g}{normalized}"
