"""Linear evaluation, or fine-tuning, of a pre-trained backbone with solo-learn: ``python -m solo_ext.main_linear``."""

import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

USAGE = """usage: python -m solo_ext.main_linear --config-path FOLDER --config-name NAME [key=value ...]

Trains a linear classifier on a frozen pre-trained backbone, or with finetune=True the backbone too.

  --config-path FOLDER                where the YAML files are: configs/solo/digits, or a folder of your own
  --config-name NAME                  which of them, such as linear.yaml
  pretrained_feature_extractor=PLACE  a checkpoint (quote its name: key='a-ep=1.ckpt'), or the folder of a run
  key=value                           changes an entry; +key=value adds one, ++key=value does either

The run's folder is <checkpoint.dir>/linear/<checkpoint.version>: args.json, a checkpoint, metrics.csv and
linear.json with the accuracy at the end and the best."""


def evaluate(cfg: DictConfig) -> Path:
    """Train and evaluate a linear classifier as ``cfg`` says.

    Args:
        cfg: a configuration in the format of solo-learn's main branch, as Hydra composed it.

    Returns:
        The run's folder.

    Raises:
        UserError: something is wrong with the configuration, the data or the checkpoint; nothing has been trained.
    """
    from solo_ext.backbones import build_backbone
    from solo_ext.checkpoint import Checkpointer, find_checkpoint, load_backbone, run_folder
    from solo_ext.compat import LinearModel
    from solo_ext.config import parse_linear
    from solo_ext.data import Images, evaluation_transform, image_dataset, linear_transform
    from solo_ext.launch import build_trainer, seed_everything
    from solo_ext.logs import BestAccuracy, callbacks, loggers, versions, write_json

    cfg = parse_linear(cfg)
    data = cfg.data
    given = OmegaConf.to_container(cfg, resolve=True)
    seed_everything(cfg.seed)
    sizes = data.get("augmentations") or {}
    crop_size = sizes.get("crop_size", 224)
    backbone = build_backbone(cfg.backbone.name, OmegaConf.to_container(cfg.backbone.kwargs), data.dataset, crop_size)
    source = find_checkpoint(cfg.pretrained_feature_extractor)
    load_backbone(source, backbone)
    model = LinearModel(backbone, cfg)
    train = image_dataset(
        data.dataset, data.train_path, "train", linear_transform(data.dataset, cfg), indexed=False, no_labels=False
    )
    transform = evaluation_transform(data.dataset, crop_size, sizes)
    val = image_dataset(data.dataset, data.val_path, "val", transform, indexed=False, no_labels=False)

    folder = run_folder(cfg, "linear")
    best = BestAccuracy()
    hooks = [*callbacks(cfg, folder), best, *([Checkpointer(cfg, folder)] if cfg.checkpoint.enabled else [])]
    trainer = build_trainer(cfg, loggers(cfg, folder, 0), hooks)
    began = time.perf_counter()
    trainer.fit(model, datamodule=Images(train, val, cfg, drop_last=False))
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        summary = {
            "framework": "solo-learn",
            "checkpoint": str(source),
            "finetune": cfg.finetune,
            "dataset": data.dataset,
            "train_path": str(data.train_path),
            "train_images": len(train),
            "seed": cfg.seed,
            "epochs": cfg.max_epochs,
            "acc1": metrics.get("val_acc1"),
            "acc5": metrics.get("val_acc5"),
            "best_acc1": best.acc1,
            "seconds": time.perf_counter() - began,
            "versions": versions(),
            "config": given,
        }
        write_json(folder / "linear.json", summary)
        print(f"accuracy {summary['acc1']:.2f} % (best of all epochs {best.acc1:.2f} %)  wrote {folder}", flush=True)
    return folder


def main() -> None:
    """The command."""
    from solo_ext.launch import run_hydra

    run_hydra(evaluate, USAGE)


if __name__ == "__main__":
    main()
