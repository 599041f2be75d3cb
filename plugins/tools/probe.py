"""Probes of frozen features, as the code of DISSL fits them (Dubois et al. 2022, arXiv:2209.06235).

A probe is a linear classifier or an MLP, trained by gradient on features that were computed once, or one of
scikit-learn's linear classifiers. The published code tries several settings of each and reports the best accuracy on
the test images. Here a part of the training labels is held out, the setting is chosen there, and what is reported is
the accuracy on the test images of a probe with that setting, fitted to all training labels; the published way is an
option, and every result names which way was taken.
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

HIDDEN_LAYERS = {"linear": 0, "mlp": 2}
"""Kinds of probes that are trained by gradient, and their hidden layers (Linear, BatchNorm, ReLU)."""
KINDS = (*HIDDEN_LAYERS, *CLASSIFIERS)
OPTIMIZERS = ("sgd", "lars", "adamw")
SELECT = ("validation", "test")
"""What a setting is chosen on: a held-out part of the training labels, or, as published, the test images."""


class Setting(NamedTuple):
    """How a linear probe or an MLP is trained.

    Args:
        weight_decay: >= 0; L2 on everything with "sgd", on matrices with "lars", decoupled with "adamw".
        lr: learning rate of the first epoch, > 0; a cosine schedule takes it to 0.
        optimizer: "sgd" and "lars" with momentum 0.9, or "adamw".
        normalized: whether a BatchNorm without scale and shift comes before the probe.
    """

    weight_decay: float = 1e-6
    lr: float = 0.6
    optimizer: str = "sgd"
    normalized: bool = False

    def check(self) -> None:
        """Raise ValueError where a value is out of its range."""
        check_range("weight_decay", self.weight_decay, low=0)
        _check_within("lr", self.lr)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)


class Probe(NamedTuple):
    """What is fitted and how.

    Args:
        kind: "linear" or "mlp", or "logistic" or "svc" for scikit-learn's on features between 0 and 1.
        grid: of a linear probe or an MLP, the settings to choose from; of one nothing is chosen.
        C: of scikit-learn's, the inverse strengths of regularisation to choose from, each > 0.
        search: of scikit-learn's, how many C to draw instead, log-uniform in [1e-4, 100].
        fraction: part of the training labels that are used, in (0, 1]; of each class its share.
        hidden_dim: width of the MLP's two hidden layers.
        holdout: part of these labels on which a setting is chosen, in (0, 1).
        epochs: >= 1.
        batch_size: >= 2; there may be fewer rows.
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
        """Raise ValueError where a value is out of its range."""
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
        """What is tried, in order; ``seed`` is that of drawn ones."""
        if self.kind in HIDDEN_LAYERS:
            return [setting._asdict() for setting in self.grid]
        return [{"C": value} for value in self.C or draw_strengths(self.search, seed)]


_RANGES = {"fraction": "above 0 and at most 1", "holdout": "between 0 and 1", "lr": "above 0", "C": "above 0"}


def _check_within(name: str, value: float) -> None:
    high = math.inf if name in ("lr", "C") else 1
    if not 0 < value < high and (name, value) != ("fraction", 1):
        raise ValueError(f"{name} must be {_RANGES[name]}, got {value!r}")


def stratified(labels: Int[Tensor, " N"], count: int, seed: int) -> tuple[Tensor, Tensor]:
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
    labels: Int[Tensor, " N"],
    classes: int,
    probe: Probe,
    setting: Setting,
    *,
    seed: int,
) -> nn.Module:
    """Train a linear probe or an MLP on the device of the features.

    Args:
        features: of the frozen backbone.
        labels: their classes, in [0, classes).
        classes: how many there are.
        probe: kind, epochs and batches; of its grid nothing is used.
        setting: of the training.
        seed: of its first weights and of the order of the rows.

    Returns:
        The probe, in evaluation mode: ``[N, D]`` → ``[N, classes]``.

    Raises:
        ValueError: "lars" without timm.
    """
    width = features.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = HIDDEN_LAYERS[probe.kind]
        model = issl_head(width, classes, layers=layers, hidden_dim=probe.hidden_dim)
        if setting.normalized:
            model.insert(0, nn.BatchNorm1d(width, affine=False))
        model.to(features.device).train()
        optimizer = _optimizer(model, setting)
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
    # without weight decay too the step of a matrix is in proportion to its norm; biases and norms take plain steps
    groups = [{"params": matrices, "always_adapt": True}, {"params": others, "weight_decay": 0.0}]
    return Lars([group for group in groups if group["params"]], trust_coeff=0.001, **shared)


@torch.no_grad()
def accuracy(
    model: Callable[[Tensor], Tensor], features: Float[Tensor, "N D"], labels: Int[Tensor, " N"]
) -> tuple[float, float]:
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
    track: Callable[[list[dict[str, Any]]], Iterable[dict[str, Any]]] = iter,
) -> dict[str, Any]:
    """Fit a probe with each setting to a part of the training labels, choose one, and report its test accuracy.

    Args:
        train: features ``[N, D]`` and classes ``[N]``.
        test: the same of the test images.
        probe: what is fitted and how.
        select: "validation": on a held-out part of the labels; "test": the best test accuracy, as published, which is
            no estimate of the accuracy on further images.
        seed: of the draws and of each fit.
        track: goes through the settings; a progress bar.

    Returns:
        ``kind``, ``dim`` (D), ``fraction``, ``labels`` (how many were used), ``select`` ("nothing" for one setting);
        the chosen setting, which is ``C`` or the entries of :class:`Setting`, with ``acc1`` and ``acc5``; ``grid``: for
        each setting also ``acc1`` and ``acc5`` on the test images and ``validation_acc1`` (None where none was held
        out). Accuracies in per cent.

    Raises:
        ValueError: a value out of its range, too few labels to draw or to hold out, or a missing package.
    """
    check_choice("select", select, SELECT)
    probe.check()
    settings = probe.settings(seed)
    select = select if len(settings) > 1 else "nothing"
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
        **{"labels": len(labels), "select": select},
        **{key: value for key, value in best.items() if key != "validation_acc1"},
        "grid": grid,
    }


def describe(row: dict[str, Any]) -> str:
    """A setting in words, of a result of :func:`evaluate_probe` or of an entry of its grid.

    >>> describe({**Setting(lr=0.1, normalized=True)._asdict(), "acc1": 93.0})
    'sgd, lr 0.1, weight decay 1e-06, normalized'
    >>> describe({"C": 0.5})
    'C 0.5'
    """
    if "C" in row:
        return f"C {row['C']:.3g}"
    normalized = ", normalized" if row["normalized"] else ""
    return f"{row['optimizer']}, lr {row['lr']:g}, weight decay {row['weight_decay']:g}{normalized}"
