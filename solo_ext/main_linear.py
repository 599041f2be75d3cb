"""Linear evaluation, or fine-tuning, of a pre-trained backbone with solo-learn: ``python -m solo_ext.main_linear``."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.process import end_with_first_process, exit_when_stopped

USAGE = """usage: python -m solo_ext.main_linear --config-path FOLDER --config-name NAME [key=value ...]

Trains a linear classifier on a frozen pre-trained backbone. With finetune=True, the backbone is trained too.
With normalized_classifier=True, a BatchNorm without scale and shift precedes the classifier.

  --config-path FOLDER                folder of the YAML files: configs/solo/digits, or one of your own
  --config-name NAME                  one of its files, such as linear.yaml
  pretrained_feature_extractor=PATH   a checkpoint, or the folder of a run
  key=value                           changes an entry; +key=value adds an entry, ++key=value adds or changes an entry
  --help-config                       lists all entries and their values

The run's folder is <checkpoint.dir>/linear/<checkpoint.version>: args.json, a checkpoint, metrics.csv and
linear.json with the final and the best accuracy."""


def evaluate(cfg: DictConfig) -> Path:
    """Train and evaluate a linear classifier.

    Args:
        cfg: the configuration that Hydra composed, in the format of solo-learn's main branch.

    Returns:
        The run's folder.

    Raises:
        UserError: the configuration, the data or the checkpoint is invalid; raised before any training.
    """
    from plugins.patches import see_patches_
    from plugins.tools.records import write_json
    from solo_ext.backbones import build_backbone
    from solo_ext.checkpoint import (
        ARGS,
        Checkpointer,
        claim_folder,
        find_checkpoint,
        load_backbone,
        resume_point,
        run_folder,
    )
    from solo_ext.compat import LinearModel
    from solo_ext.config import parse_linear
    from solo_ext.data import linear_images
    from solo_ext.features import evaluated_patches, read_config
    from solo_ext.launch import as_user_error, build_trainer, seed_everything
    from solo_ext.loaders import finish_bad_images
    from solo_ext.logs import BestAccuracy, Totals, callbacks, host_versions, loggers
    from solo_ext.transforms import linear_crop

    cfg = parse_linear(cfg)
    data = cfg.data
    given = OmegaConf.to_container(cfg, resolve=True)
    seed_everything(cfg.seed)
    crop_size = linear_crop(data.dataset, cfg).side
    backbone = build_backbone(cfg.backbone.name, OmegaConf.to_container(cfg.backbone.kwargs), data.dataset, crop_size)
    source = find_checkpoint(cfg.pretrained_feature_extractor)
    load_backbone(source, backbone)
    if (source.parent / ARGS).is_file() and (patches := evaluated_patches(read_config(source.parent))) is not None:
        see_patches_(backbone, *patches)
    with as_user_error("the linear model"):
        model = LinearModel(backbone, cfg, *_mixing(cfg))
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    images = linear_images(cfg)
    start = resume_point(cfg, "linear", run_folder(cfg, "linear"), model)
    folder, resumed, images.start_epoch, images.start_batch = start[:4]
    if start.is_complete("linear.json"):
        return folder
    lock = claim_folder(folder, resumed)
    if images.bad is not None:
        images.bad.folder = folder
    best, totals, checkpointer = BestAccuracy(), Totals(), Checkpointer(cfg, folder, resumed)
    hooks = [*callbacks(cfg), best, totals, *([checkpointer] if cfg.checkpoint.enabled else [])]
    trainer = build_trainer(cfg, loggers(cfg, folder, images.start_epoch), hooks)
    with exit_when_stopped(checkpointer.resume_hint):
        trainer.fit(model, datamodule=images, ckpt_path=resumed, weights_only=True if resumed else None)
        # max_steps and max_time end an epoch without its validation
        if trainer.current_epoch % cfg.check_val_every_n_epoch != 0 or not trainer.is_last_batch:
            trainer.validate(model, dataloaders=images.val_dataloader(), verbose=False)
            best.acc1 = max(best.acc1, float(trainer.callback_metrics["val_acc1"]))
    bad = finish_bad_images(images, trainer)
    if trainer.is_global_zero:
        totals.update(trainer)
        metrics = totals.metrics
        summary = {
            "framework": "solo-learn",
            "checkpoint": str(source),
            "finetune": cfg.finetune,
            "dataset": data.dataset,
            "train_path": str(data.train_path),
            "train_images": len(images.train),
            "seed": cfg.seed,
            "epochs": max(trainer.current_epoch, images.start_epoch),
            "acc1": metrics.get("val_acc1"),
            "acc5": metrics.get("val_acc5"),
            "best_acc1": best.acc1,
            "seconds": totals.seconds,
            **bad,
            "versions": host_versions(),
            "config": given,
        }
        write_json(folder / "linear.json", summary)
        print(f"accuracy {summary['acc1']:.2f} % (best of all epochs {best.acc1:.2f} %)  wrote {folder}", flush=True)
    lock.close()
    return folder


def _mixing(cfg: DictConfig) -> tuple[Any, Any]:
    """Return loss and mixing function for ``mixup``, ``cutmix`` and ``label_smoothing``; None for the defaults."""
    from timm.data.mixup import Mixup
    from timm.loss import SoftTargetCrossEntropy

    smoothing = float(cfg.label_smoothing)
    if cfg.mixup > 0 or cfg.cutmix > 0:
        mix = Mixup(cfg.mixup, cfg.cutmix, label_smoothing=smoothing, num_classes=cfg.data.num_classes)
        return SoftTargetCrossEntropy(), mix
    return (torch.nn.CrossEntropyLoss(label_smoothing=smoothing), None) if smoothing else (None, None)


def main() -> None:
    """Run the command."""
    from solo_ext.launch import run_hydra

    end_with_first_process()
    with exit_when_stopped("run the command again"):
        run_hydra(evaluate, USAGE, "main_linear")


if __name__ == "__main__":
    main()
