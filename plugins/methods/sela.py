"""SeLa: labels of equal class sizes for the whole training set, which the network predicts (arXiv:1911.05371)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.clock import Clock, Feed
from plugins.distributed import Collective
from plugins.draws import draw_seed
from plugins.losses import SeLaTerms, sela_terms
from plugins.methods.common import HALF_FEATURES, SCALE_LOSS, ProjectingLoss
from plugins.spec import Embeddings, MethodSpec, Option, Paper
from plugins.targets.balanced_labels import assign_balanced
from plugins.targets.label_table import LabelTable, Progress, collect_features, warn_without_pass

SPACINGS = ("linear", "square")
VIEWS = ("eval", "train")
BLOCK = 4096
"""Rows whose logits are computed at once."""


def updates_labels(epoch: int, updates: int, epochs: int, spacing: str) -> bool:
    """Return whether labels are made before an epoch, as published: M updates at the times ``t_j``.

    ``t_j = (E + 1.0001) j / (M - 1)`` epochs, or ``(E + 1.01) (j / (M - 1))²`` for "square", j = 0 … M - 1. The labels
    are made at the start of the first epoch at or after such a time.

    Args:
        epoch: number of the epoch, from 0.
        updates: M ≥ 1.
        epochs: E ≥ 1, of the run.
        spacing: "linear" as in the published CIFAR script, or "square" as in that for ImageNet.

    >>> [epoch for epoch in range(9) if updates_labels(epoch, 4, 8, "square")]
    [0, 2, 5]
    """
    power, last = (2, epochs + 1.01) if spacing == "square" else (1, epochs + 1.0001)
    times = (last * (j / max(updates - 1, 1)) ** power for j in range(updates))
    return any(epoch - 1 < time <= epoch for time in times)


class _Loss(ProjectingLoss):
    def __init__(self, options: Mapping[str, Any], comm: Collective) -> None:
        super().__init__(options, comm)
        self.clock = Clock()
        self.table = LabelTable(options["n_heads"], options["n_clusters"], seed=draw_seed(options["labels_seed"]))

    def forward(self, e: Embeddings) -> SeLaTerms:
        self.clock()
        heads, classes = self.options["n_heads"], self.options["n_clusters"]
        if e.p[0].shape[1] != heads * classes:
            raise ValueError(
                f"{heads} heads of {classes} classes need {heads * classes} outputs, got {e.p[0].shape[1]}; change "
                "n_heads, n_clusters, or the projection head"
            )
        terms = sela_terms(e.p[0], self.table.read(e.index), comm=self.comm)
        return terms._replace(loss=terms.loss * self.options["scale_loss"])

    @torch.no_grad()
    def start_epoch(self, epoch: int, feed: Feed | None) -> Iterable[nn.Parameter]:
        """Make the labels of the heads whose turn it is."""
        done = int(self.table.epoch)
        if done == epoch or not self._is_turn(epoch):  # a run that is resumed within an epoch keeps its labels
            return ()
        if feed is None:
            if done < 0:
                warn_without_pass("SeLa", "random labels")
            return ()
        options, progress = self.options, Progress("sela", self.comm)
        view, mode, half = options["label_view"], options["label_mode"], options["half_features"]
        index, features = collect_features(feed, self.table.size, progress, self.comm, view=view, mode=mode, half=half)
        heads = range(options["n_heads"])
        for head in [epoch % len(heads)] if options["rotate_heads"] else heads:
            found = assign_balanced(
                self._log_probabilities(features, head),
                **{name: options[name] for name in ("lamb", "tol", "max_iter")},
                comm=self.comm,
                report=progress.of(f"labels of head {head + 1} of {len(heads)}, iteration", options["max_iter"]),
            )
            self.table.write(head, index, found.labels, self.comm)
        self.table.epoch.fill_(epoch)
        return ()

    def _is_turn(self, epoch: int) -> bool:
        updates = self.options["label_updates"]
        if not updates:
            return True
        if not self.clock.total or not self.clock.steps_per_epoch:
            raise ValueError(
                f"label_updates={updates} needs the number of epochs of the run, which is unknown; set it to 0, "
                "which makes labels in each epoch"
            )
        epochs = max(round(self.clock.total / self.clock.steps_per_epoch), 1)
        return updates_labels(epoch, updates, epochs, self.options["label_spacing"])

    def _log_probabilities(self, features: Tensor, head: int) -> Tensor:
        """Return the logarithms of the class probabilities of one head, ``[N, K]``."""
        projector, classes = self.projector, self.options["n_clusters"]
        columns = slice(head * classes, (head + 1) * classes)
        rows = features.new_empty(len(features), classes, dtype=torch.float32)
        for start in range(0, len(features), BLOCK):
            if isinstance(projector, nn.Linear):  # only the columns that are needed
                block = features[start : start + BLOCK].to(projector.weight.dtype)
                bias = None if projector.bias is None else projector.bias[columns]
                logits = F.linear(block, projector.weight[columns], bias)
            else:
                logits = projector(features[start : start + BLOCK].to(next(projector.parameters()).dtype))[:, columns]
            rows[start : start + BLOCK] = logits.double().log_softmax(1)
        return rows


def _head(features_dim: int, options: Mapping[str, Any]) -> nn.Module:
    return nn.Linear(features_dim, options["n_heads"] * options["n_clusters"])


SPEC = MethodSpec(
    name="sela",
    loss=_Loss,
    head=_head,
    predictor=None,
    teacher=False,
    views=1,
    indexed=True,
    options={
        "n_clusters": Option(
            128, "classes K of each head, >= 2; 3000 on ImageNet", aliases={"num_clusters": None}, low=2
        ),
        "n_heads": Option(10, "heads H, each with labels of its own, >= 1", aliases={"num_cluster_heads": None}, low=1),
        "lamb": Option(25.0, "exponent λ of the probabilities, > 0; 10 in the published CIFAR script", low=1e-6),
        "label_updates": Option(
            0, "number M of label updates in the run, 100 on ImageNet, >= 0; 0 makes labels in each epoch", low=0
        ),
        "label_spacing": Option("linear", "times of the updates: even, or denser at the start", choices=SPACINGS),
        "rotate_heads": Option(False, "whether an update is that of one head, epoch mod H, as in the CIFAR script"),
        "tol": Option(1e-5, "mean relative change of the rows at which an assignment ends, >= 0", low=0.0),
        "max_iter": Option(1000, "largest number of iterations of an assignment, >= 1", low=1),
        "label_view": Option(
            "eval", "images that are labelled: as evaluated, or as published, augmented", choices=VIEWS
        ),
        "label_mode": Option("eval", "mode of the network that labels; train is the published one", choices=VIEWS),
        "half_features": HALF_FEATURES,
        "scale_loss": replace(SCALE_LOSS, help="factor of the mean over the heads, > 0; n_heads makes it the sum"),
        "labels_seed": Option(0, "seed of the first labels, >= 0", low=0),
    },
    paper=Paper("SeLa", "Asano, Rupprecht and Vedaldi 2020, arXiv:1911.05371, eqs. 6-8"),
    width=None,
)
