"""Checkpoints: where and how they are written, and the checks before training is resumed from one.

The layout is solo-learn's: ``<checkpoint.dir>/<method>/<version>/<name>-<version>-ep=<epoch>.ckpt``, and the
configuration beside it in args.json. Checkpoints are written atomically: if the process is killed or the disk is full,
the previous checkpoint is kept.
"""

import glob
import json
import os
import random
import string
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.norms import fit_norms_
from plugins.sobel import restore_sobel_
from plugins.spelling import counted
from plugins.tools.command import UserError, first_process, print_on_rank_zero
from plugins.tools.export import read_backbone
from plugins.tools.fitting import mismatch
from plugins.tools.process import locked_folder
from plugins.tools.records import difference, read_json, write_json
from plugins.tools.stems import fit_stem_, stem_record
from plugins.tools.trainer import (
    AtomicCheckpointIO,
    batches_done,
    completed_epochs,
    ends_run,
    save_atomically,
    steps_done,
)
from plugins.tools.unpickle import read_without_code
from solo_ext.compat import pl
from solo_ext.compat.common import LATE_BUFFERS

ARGS = "args.json"
_VERSION = "SOLO_EXT_RUN_VERSION"
_MARK = "solo_ext"

# Entries that must not change when training is resumed. Entries that others may be derived from come first.
_STATE = (
    "method",
    "dataset",
    "method_kwargs",
    "momentum",
    "backbone",
    "optimizer",
    "scheduler",
    "accumulate_grad_batches",
    "accumulate",
    "finetune",
    "normalized_classifier",
)
# Further entries that identify a run. Folders, devices, precision and logging may change.
_IDENTITY = (
    *_STATE,
    "name",
    *("augmentations", "shared_flip"),
    *("max_epochs", "max_steps"),
    "seed",
    "pretrained_feature_extractor",
    *("auto_augment", "mixup", "cutmix", "label_smoothing"),
    *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches"),
)
# Entries of ``data`` that do not identify a run: the reader, the validation images, and derived numbers.
_NOT_OF_IDENTITY = (
    *("dataset", "val_path", "num_workers", "skip_bad_images"),
    *("num_classes", "num_large_crops", "num_small_crops"),
)


def run_folder(cfg: DictConfig, kind: str) -> Path:
    """Return ``<checkpoint.dir>/<kind>/<version>``; the version is ``checkpoint.version``, or a new random one.

    Args:
        cfg: the configuration.
        kind: the method's name, or "linear"; ``checkpoint.group`` replaces it.
    """
    version = cfg.checkpoint.version or _new_version()
    return Path(cfg.checkpoint.dir) / (cfg.checkpoint.group or kind) / version


def _new_version() -> str:
    """Return a random name that is the same in all processes of a run.

    Processes of SLURM or torchrun draw the name with the job's id as seed: a name in their environment may be that of a
    run of the process that submitted the job. Processes that Lightning starts inherit the name.
    """
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    job = os.environ.get("SLURM_JOB_ID") if several else os.environ.get("TORCHELASTIC_RUN_ID")
    of_job = job not in (None, "none")
    if not of_job and not first_process() and _VERSION in os.environ:
        return os.environ[_VERSION]
    letters = random.Random(job if of_job else time.time_ns())
    version = "offline-" + "".join(letters.choices(string.ascii_lowercase + string.digits, k=8))
    os.environ[_VERSION] = version
    return version


def identity(cfg: DictConfig) -> dict[str, Any]:
    """Return the part of a configuration that identifies a run, as plain values.

    Args:
        cfg: the configuration, before the learning rate is multiplied by the number of devices: that number may change.
    """
    return _identity(OmegaConf.to_container(cfg))


def _identity(cfg: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a configuration of plain values; the value of a missing entry is None."""
    same = {key: cfg.get(key) for key in _IDENTITY}
    same["shared_flip"] = same["shared_flip"] or None  # as in runs of releases that did not have it
    data = {key: value for key, value in cfg["data"].items() if key not in _NOT_OF_IDENTITY}
    for holder, key in ((data, "train_path"), (same, "pretrained_feature_extractor")):
        if holder.get(key) is not None:
            holder[key] = str(Path(holder[key]).expanduser().resolve())
    return json.loads(json.dumps({**same, "dataset": cfg["data"]["dataset"], "data": data}))


def _recorded(args: dict[str, Any]) -> dict[str, Any]:
    """Return the identity in an args.json; entries that an earlier release did not record are taken from the rest."""
    recorded = args["identity"]
    if "data" in recorded:
        return recorded
    complete = {**_identity(args), **{key: value for key, value in recorded.items() if key != "custom_data"}}
    for holder, given, key in (
        (complete["data"], args["data"], "train_path"),
        (complete, args, "pretrained_feature_extractor"),
    ):
        if not Path(given.get(key) or "").is_absolute():
            holder.pop(key, None)  # the path is relative to an unknown working directory
    return complete


def _contradiction(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the full name and both values of the first entry in which two identities differ, or None if equal."""
    ours = {**ours, "data": dict(ours["data"])}
    for there, here, key in (
        (theirs, ours, "pretrained_feature_extractor"),
        (theirs["data"], ours["data"], "train_path"),
    ):
        if key not in there:
            here.pop(key, None)
    for key in (*_IDENTITY, *sorted(theirs.keys() | ours.keys())):
        if theirs.get(key) != ours.get(key):
            return difference(key, theirs.get(key), ours.get(key))
    return None


def check_writable(folder: Path, option: str) -> None:
    """Create a folder, and check that files can be written in it.

    Args:
        folder: the folder.
        option: name of the option that gives the folder, for the error message.

    Raises:
        UserError: no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option}: cannot write to {folder}: {error.strerror}") from None


def claim_folder(folder: Path, resumed: Path | None) -> ExitStack:
    """Create the folder of a run and lock it, so that no other run writes to it.

    Args:
        folder: the run's folder.
        resumed: the checkpoint that training is resumed from, or None.

    Returns:
        An ExitStack that releases the lock when it is closed.

    Raises:
        UserError: the folder contains a checkpoint that this run does not resume, or another run writes to it.
    """
    check_writable(folder, "checkpoint.dir")
    with ExitStack() as lock:
        if first_process():
            lock.enter_context(locked_folder(folder))
        existing = sorted(folder.glob("*.ckpt"))
        if existing and (resumed is None or resumed.resolve().parent != folder.resolve()):
            raise UserError(
                f"{folder} already contains a run ({existing[-1].name}); set another checkpoint.version, delete the "
                "folder, or resume the run with auto_resume.enabled=True and the same settings"
            )
        return lock.pop_all()


class _CheckpointIO(AtomicCheckpointIO, pl.plugins.io.TorchCheckpointIO):
    """Lightning's checkpoint format, written atomically."""


class Checkpointer(pl.Callback):
    """Save args.json when training starts, and a checkpoint every ``checkpoint.frequency`` epochs and after the last.

    Args:
        cfg: the configuration.
        folder: the run's folder.
        resumed: the checkpoint that the run is resumed from, or None.
    """

    def __init__(self, cfg: DictConfig, folder: Path, resumed: Path | None = None) -> None:
        self.cfg = cfg
        self.folder = folder
        self.resumed = resumed
        self._replaced: list[str] = []  # checkpoints of this run that are deleted after the next one is saved

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the checkpoints to delete after the next one is saved; a resumed run deletes no other."""
        return {"replaced": list(self._replaced)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the names of the checkpoints to delete."""
        self._replaced = list(state_dict["replaced"])

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Make the trainer write checkpoints atomically."""
        trainer.strategy.checkpoint_io = _CheckpointIO()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write args.json."""
        self.write_args(trainer)

    def write_args(self, trainer: pl.Trainer) -> None:
        """Write the configuration to args.json on rank 0."""
        if trainer.is_global_zero:
            args = OmegaConf.to_container(self.cfg, resolve=True)
            args["wandb_run_id"] = self.folder.name if self.cfg.wandb.enabled else None
            write_json(self.folder / ARGS, args)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save a checkpoint at the epochs that ``checkpoint.frequency`` selects."""
        epoch = trainer.current_epoch
        if (epoch + 1) % self.cfg.checkpoint.frequency == 0 or ends_run(trainer):
            self.save(trainer, epoch)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{self.cfg.name}-{self.folder.name}-ep={epoch}.ckpt"

    def save_weights(self, model: torch.nn.Module) -> None:
        """Save the weights of an untrained network together with the run's identity."""
        save_atomically({"state_dict": model.state_dict(), **self._record(model)}, self._path(0))

    def save(self, trainer: pl.Trainer, epoch: int) -> None:
        """Save a checkpoint and, unless ``checkpoint.keep_prev``, delete the previous one. Call it on all ranks."""
        path = self._path(epoch)
        previous = [name for name in self._replaced if name != path.name]
        self._replaced = [] if self.cfg.checkpoint.keep_prev else [*previous, path.name]
        trainer.save_checkpoint(path)
        if trainer.is_global_zero and self._replaced:
            for name in previous:
                (self.folder / name).unlink(missing_ok=True)
            self._replaced = [path.name]

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the run's identity and the stem of the backbone to the checkpoint."""
        checkpoint.update(self._record(module))

    def _record(self, model: Any) -> dict[str, Any]:
        return {_MARK: OmegaConf.to_container(self.cfg.identity), **stem_record(model.backbone)}

    def resume_hint(self) -> str:
        """Return the instruction for resuming this run, for the last line of a stopped run."""
        # look on the disk, since the signal may arrive just after a checkpoint was written
        saved = _newest_first(self.folder.glob("*-ep=*.ckpt")) if self.cfg.checkpoint.enabled else []
        last = saved[0] if saved else self.resumed
        if last is None:
            return "no checkpoint was written yet; run the command again"
        if self.cfg.auto_resume.enabled:
            return f"run the same command again to resume from {last}"
        return f"add \"++resume_from_checkpoint='{last}'\" to the command to resume"


def read_checkpoint(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Load the tensors and plain values of a checkpoint onto the CPU, without running code in the file.

    Args:
        path: the file.
        to_resume: whether the complete content is needed, not only the weights.

    Raises:
        UserError: the file is missing, corrupt or not safe to load, or ``to_resume`` is True and it contains code.
    """
    checkpoint, code = _read(path)
    if to_resume:
        _check_no_code(path, code)
    return checkpoint


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint; return its content and the names of the functions and classes in it."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    checkpoint, code = read_without_code(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is not a checkpoint of solo-learn: it has no state_dict")
    return checkpoint, code


def _check_no_code(path: Path, code: list[str]) -> None:
    if code:
        raise UserError(
            f"{path} contains code ({code[0]}, …), as the checkpoints of solo-learn's own scripts do: "
            "its weights can be evaluated, but training cannot be resumed from it"
        )


def find_checkpoint(place: str | Path, epoch: int | None = None) -> Path:
    """Return the checkpoint at a path; if the path is a run's folder, the newest readable checkpoint in it.

    Args:
        place: a checkpoint, or the folder of a run.
        epoch: number in the name of the checkpoint in the folder; None selects the newest.

    Raises:
        UserError: there is no such checkpoint.
    """
    place = Path(place)
    if epoch is not None:
        numbers = {path.stem.rpartition("-ep=")[2]: path for path in sorted(place.glob("*-ep=*.ckpt"))}
        if str(epoch) not in numbers:
            saved = ", ".join(sorted(numbers, key=lambda number: (len(number), number))) or "none"
            raise UserError(f"there is no checkpoint of epoch {epoch} in {place}; there are those of: {saved}")
        return numbers[str(epoch)]
    if place.is_dir():
        found = _newest_first(place.glob("*.ckpt"))
        if not found:
            raise UserError(f"there is no checkpoint in {place}")
        if len(found) == 1:
            return found[0]  # if it cannot be read, the caller raises the error
        readable = _first_readable(found)
        return readable[0] if readable else found[0]
    if not place.is_file():
        raise UserError(f"there is no checkpoint {place}")
    return place


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _first_readable(paths: list[Path]) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return the path, content and code of the first readable checkpoint; print a line for each skipped one."""
    for path in paths:
        try:
            return path, *_read(path)
        except UserError as error:
            print_on_rank_zero(f"skipped: {error}")
    return None


def check_resumable(path: Path, checkpoint: dict[str, Any], cfg: DictConfig, model: torch.nn.Module) -> int:
    """Check that a checkpoint has the method, the settings and the network of this run.

    Args:
        path: the file, for error messages.
        checkpoint: its content.
        cfg: the configuration.
        model: the network to be trained.

    Returns:
        The number of epochs that the network of the checkpoint was trained for.

    Raises:
        UserError: the checkpoint belongs to another method or network; the message names the first difference.
    """
    recorded = checkpoint.get(_MARK, {})
    current = OmegaConf.to_container(cfg.identity)
    for key in _STATE:
        if key in recorded and recorded[key] != current[key]:
            name, theirs, ours = difference(key, recorded[key], current[key])
            raise UserError(f"{path} is a checkpoint with {name} {theirs}, but this run has {name} {ours}")
    theirs, ours = checkpoint["state_dict"], model.state_dict()
    theirs = {name: tensor for name, tensor in theirs.items() if name in ours or name not in LATE_BUFFERS}
    for name in (*sorted(set(ours) - set(theirs)), *sorted(set(theirs) - set(ours))):
        raise UserError(f"{path} is a checkpoint of another network: {name} is in only one of the two")
    for name, tensor in ours.items():
        # a memory of the training images gets its size when training starts, or from the checkpoint
        empty = tensor.ndim > 0 and len(tensor) == 0 and tensor.shape[1:] == theirs[name].shape[1:]
        if not empty and theirs[name].shape != tensor.shape:
            shapes = f"{tuple(theirs[name].shape)}, but {tuple(tensor.shape)} in this run"
            raise UserError(f"{path} is a checkpoint of another network: {name} has the shape {shapes}")
    try:
        return completed_epochs(checkpoint, cfg.get("max_steps"))
    except KeyError:
        raise UserError(f"{path} contains only weights; training cannot be resumed from it") from None


def auto_resume(cfg: DictConfig, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint of the same run and its content, or None.

    The checkpoint must not be older than ``auto_resume.max_hours``. Runs are the same if they have the same
    :func:`identity`. With ``checkpoint.version``, ``max_epochs`` and ``max_steps`` may differ, so that a run can be
    made longer.

    Args:
        cfg: the configuration.
        kind: the method's name, or "linear".

    Raises:
        UserError: ``checkpoint.version`` is the version of a run with other settings, the same run is in progress, or
            the checkpoint contains code.
    """
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    found = []
    version = cfg.checkpoint.version
    runs = Path(cfg.checkpoint.dir) / (cfg.checkpoint.group or kind)
    for args in runs.glob(f"{glob.escape(version) if version else '*'}/{ARGS}"):
        checkpoints = _newest_first(args.parent.glob("*-ep=*.ckpt"))
        if not checkpoints or checkpoints[0].stat().st_mtime < oldest:
            continue
        try:
            theirs, ours = _recorded(read_json(args)), OmegaConf.to_container(cfg.identity)
            if version is not None:
                ours.update({key: theirs.get(key) for key in ("max_epochs", "max_steps")})
            other = _contradiction(theirs, ours)
        except (ValueError, KeyError, TypeError):
            continue  # another program wrote this args.json
        if other is None:
            found += checkpoints
        elif version is not None:
            name, theirs, ours = other
            raise UserError(
                f"{args.parent} contains a run with other settings: {name} is {theirs} there, and {ours} in this run; "
                "set another checkpoint.version, or use the settings of that run"
            )
    if first_process():
        for folder in {path.parent for path in found}:
            with locked_folder(folder):  # raises an error if a run in progress may still replace the checkpoints
                pass
    readable = _first_readable(_newest_first(found))
    if readable is None:
        return None
    path, checkpoint, code = readable
    _check_no_code(path, code)
    return path, checkpoint


class ResumePoint(NamedTuple):
    """Starting point of a training."""

    folder: Path
    """The run's folder."""
    checkpoint: Path | None
    """The checkpoint to resume from; None for a new run."""
    epochs: int
    """Number of completed epochs."""
    batches: int
    """Number of batches that each process has trained on in the next epoch, if that has been cut off."""
    finished: bool
    """Whether nothing is left to train."""

    def is_complete(self, summary: str) -> bool:
        """Return whether nothing is left to do, which is printed.

        Args:
            summary: name of the file that the command writes last. A run that was killed before it must still write it.
        """
        complete = self.finished and (self.folder / summary).is_file()
        if complete:
            print_on_rank_zero(
                f"{self.checkpoint} belongs to a finished run of {counted(self.epochs, 'epoch')}: "
                "there is nothing left to train"
            )
        return complete


def resume_point(cfg: DictConfig, kind: str, folder: Path, model: torch.nn.Module) -> ResumePoint:
    """Find the checkpoint to resume from.

    Args:
        cfg: the configuration; ``resume_from_checkpoint`` or ``auto_resume`` selects the checkpoint.
        kind: the method's name, or "linear".
        folder: the folder of a run that is not resumed.
        model: the network to be trained.

    Returns:
        The place to resume from.

    Raises:
        UserError: the checkpoint belongs to another method, network or configuration.
    """
    if cfg.resume_from_checkpoint:
        found = Path(cfg.resume_from_checkpoint)
        checkpoint = read_checkpoint(found, to_resume=True)
    elif cfg.auto_resume.enabled and (newest := auto_resume(cfg, kind)) is not None:
        found, checkpoint = newest
    else:
        return ResumePoint(folder, None, 0, 0, False)
    epochs = check_resumable(found, checkpoint, cfg, model)
    if epochs > cfg.max_epochs:
        raise UserError(f"{found} was trained for {counted(epochs, 'epoch')}, more than max_epochs={cfg.max_epochs}")
    print_on_rank_zero(f"resuming after epoch {epochs} of {cfg.max_epochs} from {found}")
    finished = epochs == cfg.max_epochs or steps_done(checkpoint, cfg.get("max_steps"))
    folder = folder if cfg.checkpoint.version else found.parent
    return ResumePoint(folder, found, epochs, batches_done(checkpoint, cfg.get("max_steps")), finished)


def load_backbone(place: str | Path, backbone: torch.nn.Module) -> None:
    """Load the backbone of a file; every weight must match.

    Args:
        place: the folder of a run, or a file that ``plugins.tools.export`` reads: a checkpoint of any framework, a file
            of VICReg's scripts, or an export.
        backbone: the network that receives the weights, and the padding and max-pool of their stem.

    Raises:
        UserError: a weight is missing, unexpected or of another shape.
    """
    path = find_checkpoint(place)
    weights, _, stem = read_backbone(path)
    restore_sobel_(fit_norms_(backbone, weights), weights)
    if reason := mismatch(weights, backbone.state_dict()):
        raise UserError(f"{path} contains another backbone: {reason}")
    fit_stem_(backbone, stem).load_state_dict(weights)
