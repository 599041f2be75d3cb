"""Pre-train a method with solo-learn: ``python -m solo_ext.main_pretrain --config-path … --config-name …``.

The options are those of solo-learn's main_pretrain.py: a folder of YAML files, the name of one of them, and overrides.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.process import end_with_first_process, exit_when_stopped

USAGE = """usage: python -m solo_ext.main_pretrain --config-path FOLDER --config-name NAME [key=value ...]

Pre-trains a self-supervised method with solo-learn.

  --config-path FOLDER   folder of the YAML files: configs/solo/digits, or one of your own
  --config-name NAME     one of its files, such as isoloss.yaml
  key=value              changes an entry; +key=value adds an entry, ++key=value adds or changes an entry
  --help-config          lists all entries and their values

  example: python -m solo_ext.main_pretrain --config-path configs/solo/digits --config-name isoloss.yaml ++max_epochs=5

The run's folder is <checkpoint.dir>/<method>/<checkpoint.version>: args.json, the newest checkpoint, metrics.csv,
TensorBoard events, eigenvalues.csv with method_kwargs.log_eigvals, and pretrain.json at the end.
resume_from_checkpoint=PATH resumes from a checkpoint, or from the newest one in the folder of a run;
auto_resume.enabled=True resumes from the newest checkpoint of the same run.
++auto_umap.enabled=True draws the features of the validation images every ++auto_umap.frequency=1 epochs.
max_epochs=0 writes the untrained weights."""


def pretrain(cfg: DictConfig, further: Callable[[Path], Sequence[Any]] = lambda folder: ()) -> Path:
    """Pre-train a method.

    Args:
        cfg: the configuration that Hydra composed, in the format of solo-learn's main branch.
        further: the run's folder → further callbacks, which may log values.

    Returns:
        The run's folder.

    Raises:
        UserError: the configuration, the data or the checkpoint is invalid; raised before any training.
    """
    from plugins.tools.records import write_json
    from solo_ext.checkpoint import Checkpointer, claim_folder, resume_point, run_folder
    from solo_ext.config import parse_pretrain
    from solo_ext.data import pretrain_images
    from solo_ext.launch import as_user_error, build_trainer, seed_everything
    from solo_ext.loaders import finish_bad_images
    from solo_ext.logs import (
        SpectrumWriter,
        Throughput,
        Totals,
        WeightDecaySchedule,
        callbacks,
        host_versions,
        loggers,
    )
    from solo_ext.registry import method_class, register

    register()
    cfg = parse_pretrain(cfg)
    given = OmegaConf.to_container(cfg, resolve=True)
    cls = method_class(cfg)
    seed_everything(cfg.seed)
    with as_user_error("the method"):
        model = cls(cfg)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    images = pretrain_images(cfg)
    folder, resumed = run_folder(cfg, cfg.method), None
    if cfg.max_epochs > 0:
        start = resume_point(cfg, cfg.method, folder, model)
        folder, resumed, images.start_epoch, images.start_batch = start[:4]
        if start.is_complete("pretrain.json"):
            return folder
    lock = claim_folder(folder, resumed)
    if images.bad is not None:
        images.bad.folder = folder

    throughput, totals, checkpointer = Throughput(), Totals(), Checkpointer(cfg, folder, resumed)
    extra: list[Any] = [SpectrumWriter(folder, images.start_epoch)] if getattr(model, "log_eigvals", False) else []
    if cfg.optimizer.get("final_weight_decay") is not None:
        extra.append(WeightDecaySchedule(cfg.optimizer.weight_decay, cfg.optimizer.final_weight_decay))
    hooks = [*callbacks(cfg), *further(folder), throughput, totals, *extra, checkpointer]
    if not cfg.checkpoint.enabled:
        hooks.remove(checkpointer)
    if cfg.auto_umap.enabled:
        from solo_ext.umap import AutoUMAP

        hooks.append(AutoUMAP(cfg, folder))
    trainer = build_trainer(cfg, loggers(cfg, folder, images.start_epoch), hooks)

    if cfg.max_epochs == 0:
        checkpointer.write_args(trainer)
        checkpointer.save_weights(model)
    else:
        with exit_when_stopped(checkpointer.resume_hint):
            trainer.fit(model, datamodule=images, ckpt_path=resumed, weights_only=True if resumed else None)
    bad = finish_bad_images(images, trainer)
    if trainer.is_global_zero:
        speed = throughput.images_per_second
        totals.update(trainer)
        summary: dict[str, Any] = {
            "framework": "solo-learn",
            "method": cfg.method,
            "dataset": cfg.data.dataset,
            "seed": cfg.seed,
            "epochs": max(trainer.current_epoch, images.start_epoch),
            "steps": trainer.global_step,
            "seconds": totals.seconds,
            "images_per_second": speed and speed * trainer.world_size,
            "metrics": totals.metrics,
            **bad,
            "versions": host_versions(),
            "config": given,
        }
        write_json(folder / "pretrain.json", summary)
        print(f"wrote {folder}", flush=True)
    lock.close()
    return folder


def main() -> None:
    """Run the command."""
    from solo_ext.launch import run_hydra

    end_with_first_process()
    with exit_when_stopped("run the command again"):
        run_hydra(pretrain, USAGE, "main_pretrain")


if __name__ == "__main__":
    main()
