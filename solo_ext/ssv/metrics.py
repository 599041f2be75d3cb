"""The metric of Self-Supervised-Vision, and the features that it evaluates."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.tools.command import UserError, print_on_rank_zero
from plugins.tools.files import atomic
from plugins.tools.neighbors import neighbor_consistency
from plugins.tools.trainer import ends_run
from solo_ext.compat import pl
from solo_ext.validation import validation_outputs

LOG = "trainlogs.txt"
K = 20
"""Number of neighbours."""
EVALUATED = {
    **dict.fromkeys(("byol", "relic", "simsiam"), "prediction"),
    **dict.fromkeys(("sela", "deepcluster"), "features"),
}
"""Method → output that the original evaluates, if that is not the projection."""
UNNORMALIZED = ("sela", "dino")
"""Methods whose output the original evaluates as it is; that of the others has unit rows."""


def outputs(method: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return a function from images to the features that are evaluated.

    Args:
        method: a method of solo-learn, in evaluation mode when the function is called.

    Returns:
        images ``[B, 3, H, W]`` → "head", the output ``[B, D]`` that the original evaluates: the online prediction of
        BYOL, ReLIC and SimSiam, the features of the trunk of SeLa and DeepCluster, the projection of the others; and
        "trunk", the features of the trunk ``[B, F]``.
    """
    name = method.spec.name

    def compute(images: Tensor) -> dict[str, Tensor]:
        out = method(images)
        head, kind = out["z"], EVALUATED.get(name, "projection")
        if kind == "features":
            head = out["feats"]
        elif kind == "prediction" and method.predictor is not None:
            (head,) = method.predictor.predict([head])
        return {"head": head if name in UNNORMALIZED else F.normalize(head, dim=1), "trunk": out["feats"]}

    return compute


class NeighborMetrics(pl.Callback):
    """Measure the neighbour consistency of the test images, every few epochs and after the last epoch.

    ``val_neighbors_head`` and ``val_neighbors_trunk``, in per cent, are logged, and thus written to metrics.csv.
    A line ``[VALID] Epoch e/E [accuracy] x`` with that of the head, in [0, 1], is printed and written to trainlogs.txt,
    as in the original, and a line ``[TRAIN] Epoch e/E [loss] x`` for each epoch. Place it before the callbacks that
    collect logged values.

    Unlike the original, the network is in evaluation mode, and no image is its own neighbour; see
    :func:`plugins.tools.neighbors.neighbor_consistency`.

    Args:
        folder: the run's folder.
        every: number of epochs between two evaluations, > 0.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / LOG, every

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check that there are enough labelled test images."""
        images = trainer.datamodule.val
        if images is None or len(images) <= K:
            raise UserError(
                f"the neighbour consistency needs more than {K} labelled test images, got "
                f"{0 if images is None else len(images)}"
            )

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Delete the lines of epochs that are trained again."""
        if trainer.is_global_zero and self.path.is_file():
            lines = self.path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _epoch(line) <= trainer.current_epoch]
            with atomic(self.path, "w") as file:
                file.writelines(kept)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the network on rank 0, and write the lines of the epoch."""
        epoch = trainer.current_epoch + 1
        place = f"Epoch {epoch:4d}/{trainer.max_epochs:4d}"
        if trainer.is_global_zero and "train_ssl_loss_epoch" in trainer.callback_metrics:
            self._write(f"[TRAIN] {place} [loss] {float(trainer.callback_metrics['train_ssl_loss_epoch']):.4f}")
        if not trainer.is_global_zero or (epoch % self.every != 0 and not ends_run(trainer)):
            return
        found, labels = validation_outputs(trainer, module, outputs(module))
        shares = {}
        for name, rows in found.items():
            if not torch.isfinite(rows).all():
                print_on_rank_zero(f"no neighbour consistency of epoch {epoch}: the features contain inf or NaN")
                return
            shares[name] = neighbor_consistency(rows, labels, K)
            module.log(f"val_neighbors_{name}", 100 * shares[name], rank_zero_only=True)
        line = f"[VALID] {place} [accuracy] {shares['head']:.4f}"
        self._write(line)
        print_on_rank_zero(line)

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")


def _epoch(line: str) -> int:
    """Return the epoch of a line of the log; 0 for another line.

    >>> _epoch("[VALID] Epoch   10/1000 [accuracy] 0.6150")
    10
    """
    match = re.match(r"\[(?:TRAIN|VALID)\] Epoch +(\d+)/", line)
    return int(match[1]) if match else 0
