"""A callback that draws the validation images with UMAP while a method is trained."""

from pathlib import Path

import torch
from omegaconf import DictConfig

from plugins.tools.command import UserError
from plugins.tools.trainer import ends_run
from plugins.tools.umap import NEIGHBOURS, check_installed, embed, plot
from solo_ext.checkpoint import check_writable
from solo_ext.compat import pl
from solo_ext.features import class_names
from solo_ext.validation import validation_outputs


class AutoUMAP(pl.Callback):
    """Draw the validation images every ``auto_umap.frequency`` epochs and after the last epoch.

    A picture is written to ``<auto_umap.dir>/<method>/<version>/<name>-<version>-ep=<epoch>.pdf``, as in solo-learn,
    and as PNG, and logged to Weights & Biases if that is enabled. It does not change the random numbers of training.

    Args:
        cfg: the configuration, with ``auto_umap.dir`` and ``auto_umap.frequency``.
        folder: the run's folder, whose name is the version.

    Raises:
        UserError: umap-learn is not installed.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        check_installed()
        self.frequency = cfg.auto_umap.frequency
        self.folder = Path(cfg.auto_umap.dir) / cfg.method / folder.name
        self.stem = f"{cfg.name}-{folder.name}"
        self.seed = cfg.seed

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check before training that the pictures can be drawn and written."""
        val = trainer.datamodule.val
        if val is None:
            raise UserError("auto_umap draws the labelled validation images: set data.val_path")
        if len(val) <= NEIGHBOURS:
            raise UserError(f"auto_umap needs more than {NEIGHBOURS} validation images, got {len(val)}")
        check_writable(self.folder, "auto_umap.dir")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw a picture on rank 0, at the epochs that ``auto_umap.frequency`` selects."""
        epoch = trainer.current_epoch
        if (epoch + 1) % self.frequency != 0 and not ends_run(trainer):
            return
        if not trainer.is_global_zero:
            return
        outputs, labels = validation_outputs(trainer, module, lambda images: {"backbone": module.backbone(images)})
        features = outputs["backbone"]
        if not torch.isfinite(features).all():
            print(f"auto_umap: no picture of epoch {epoch}, since the features contain inf or NaN", flush=True)
            return
        files = [self.folder / f"{self.stem}-ep={epoch}{ending}" for ending in (".pdf", ".png")]
        title = f"{self.stem}, epoch {epoch + 1}: {len(labels)} validation images"
        classes = class_names(trainer.datamodule.val)
        plot(embed(features, seed=self.seed), labels.tolist(), classes, title, files)
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.WandbLogger):
                logger.log_image("validation_umap", [str(files[1])])
