"""The runs of ``python -m lightly_ext.benchmarks``."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pytorch_lightning import LightningModule, seed_everything
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from lightly_ext.benchmarks.checkpoints import identity, load
from lightly_ext.benchmarks.checks import prepare
from lightly_ext.benchmarks.evaluation import evaluate
from lightly_ext.benchmarks.setup import Setup
from lightly_ext.benchmarks.trainer import EpochRecord, RandomStates, trainer
from plugins.spelling import counted
from plugins.tools.bad_images import BadImages
from plugins.tools.command import UserError, first_process, print_on_rank_zero
from plugins.tools.files import atomic
from plugins.tools.process import exit_when_stopped, locked_folder
from plugins.tools.records import versions, write_json

__all__ = ["benchmark", "markdown", "prepare"]


def benchmark(setup: Setup) -> dict[str, dict[str, Any]]:
    """Train and evaluate each method, and write and print a table of the results.

    Args:
        setup: the return value of :func:`prepare`.

    Returns:
        {name of the method: result}.
    """
    results = {}
    log_dir = setup.options.log_dir
    for name in setup.methods:
        with locked_folder(log_dir / name) if first_process() else nullcontext():
            results[name] = _train_and_evaluate(setup, name, log_dir / name)
        table = markdown(results)
        if first_process():
            with atomic(log_dir / "table.md", "w") as file:
                file.write(table + "\n")
    print_on_rank_zero(table)
    return results


def markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table with a row for each method; accuracies are in per cent.

    >>> print(markdown({"byol": {"epochs": 2, "knn": {"top1": 0.5, "top5": 1.0}}}))
    | Method | Epochs | kNN top1 | kNN top5 |
    |:-------|-------:|---------:|---------:|
    | byol   |      2 |    50.00 |   100.00 |
    """
    titles = {"knn": "kNN", "linear": "Linear", "finetune": "Fine-tune"}
    columns = [
        (kind, k)
        for kind in titles
        for k in ("top1", "top5")
        if any(k in result.get(kind, {}) for result in results.values())
    ]
    rows = [["Method", "Epochs", *(f"{titles[kind]} {k}" for kind, k in columns)]]
    for name, result in results.items():
        values = [result.get(kind, {}).get(k) for kind, k in columns]
        rows.append([name, str(result["epochs"]), *("–" if v is None else f"{100 * v:.2f}" for v in values)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        " | ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    rule = "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def _train_and_evaluate(setup: Setup, name: str, folder: Path) -> dict[str, Any]:
    """Train and evaluate one method."""
    options = setup.options
    if options.seed is not None:
        seed_everything(options.seed, workers=True, verbose=False)
    if options.skip_bad_images:
        bad = BadImages(folder)
        setup = replace(setup, bad=bad)
        if options.ckpt_path is None and first_process():
            bad.reset()
    model = setup.model(name)
    result: dict[str, Any] = {"framework": "lightly", "method": name, "epochs": options.epochs, "seed": options.seed}
    result.update(versions=versions("lightly", "pytorch-lightning"), config=setup.config())
    if options.epochs > 0:
        result.update(_pretrain(setup, name, model, folder))
    elif options.ckpt_path is not None:
        load(options.ckpt_path, name, model)
    result.update(evaluate(setup, model, folder))
    if setup.bad is not None:
        if dist.is_initialized():
            dist.barrier()  # until the last process has read its last image
        if first_process():
            result["bad_images"] = setup.bad.finish()
    if first_process():
        write_json(folder / "result.json", result)
    return result


def _pretrain(setup: Setup, name: str, model: LightningModule, folder: Path) -> dict[str, Any]:
    options = setup.options
    print_on_rank_zero(f"{name}: pre-training for {counted(options.epochs, 'epoch')}")
    train = setup.loader(options.train_dir, setup.transform(name), shuffle=True, indexed=setup.is_ours(name))
    held_out: Any = setup.loader(options.val_dir, setup.plain(), held_out=True)
    if setup.wants_knn(name):
        held_out = [setup.loader(options.train_dir, setup.plain()), held_out]
    stop = EarlyStopping(monitor="train_loss", patience=10**12, check_finite=True, check_on_train_epoch_end=True)
    # by default, Lightning would save a checkpoint only after a validation
    save = ModelCheckpoint(folder, filename="checkpoint", enable_version_counter=False, save_on_train_epoch_end=True)
    record = EpochRecord(folder, identity(setup, name))
    # the record comes first, so that the checkpoint of an epoch contains its state after that epoch
    host = trainer(
        options,
        folder / "pretrain",
        options.epochs,
        [record, RandomStates(), stop, save],
        precision=options.precision,
        sync_batchnorm=True,
        epochs_before=setup.epochs_before,
    )

    def resume_hint() -> str:
        last = folder / "checkpoint.ckpt"
        if record.epochs == 0 or not last.is_file():
            return "no checkpoint was written yet; run the command again"
        return f"run the command with --methods {name} --ckpt-path {last} to resume"

    with exit_when_stopped(resume_hint):
        host.fit(model, train, held_out, ckpt_path=None if options.ckpt_path is None else str(options.ckpt_path))
    loss = record.metrics.get("train_loss")  # None if an earlier release wrote the checkpoint and no epoch was left
    if loss is not None and not math.isfinite(loss):
        raise UserError(f"{name}: the loss is {loss} after epoch {record.epochs}; set a smaller --lr")
    return {
        "train_loss": loss,
        "online": record.metrics.get("val_online_cls_top1"),
        "seconds": round(record.elapsed, 2),
        "images_per_second": record.images * host.world_size / record.seconds if record.images else None,
    }
