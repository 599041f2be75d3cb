"""Checkpoints: where they lie, what they are checked for before training goes on from them.

As solo-learn lays them out: ``<checkpoint.dir>/<method>/<version>/<name>-<version>-ep=<epoch>.ckpt`` with the whole
configuration beside it in args.json. A kill or a full disk leaves the checkpoint of before.
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
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError, first_process, say
from plugins.tools.fitting import mismatch, plain_names
from plugins.tools.process import locked_folder
from plugins.tools.records import difference, write_json
from plugins.tools.trainer import WholeFiles, save_whole
from plugins.tools.unpickle import load_inert
from solo_ext.compat import pl
from solo_ext.compat.common import LATE_BUFFERS

ARGS = "args.json"
_VERSION = "SOLO_EXT_RUN_VERSION"
_MARK = "solo_ext"

# What training goes on from: it cannot change in mid-run.
_STATE = (
    "method",
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
# What makes a run the same run beside. Other folders, devices, precision, logging and the like may change.
_IDENTITY = (
    *_STATE,
    "name",
    "augmentations",
    "max_epochs",
    "seed",
    "pretrained_feature_extractor",
    *("auto_augment", "mixup", "cutmix", "label_smoothing"),
    *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "overfit_batches"),
)
# Of ``data`` everything but what says how the images are read, evaluated or counted.
_NOT_OF_IDENTITY = ("dataset", "val_path", "num_workers", "num_classes", "num_large_crops", "num_small_crops")


def run_folder(cfg: DictConfig, kind: str) -> Path:
    """``<checkpoint.dir>/<kind>/<version>``; the version is ``checkpoint.version``, or a new random one.

    Args:
        cfg: the configuration.
        kind: the method's name, or "linear"; ``checkpoint.group`` replaces it.

    """
    version = cfg.checkpoint.version or _new_version()
    return Path(cfg.checkpoint.dir) / (cfg.checkpoint.group or kind) / version


def _new_version() -> str:
    """A random name that all processes of a run agree on.

    Those that Lightning starts inherit it, those that SLURM or torchrun start draw it from the number of the job.
    """
    if not first_process() and _VERSION in os.environ:
        return os.environ[_VERSION]
    several = int(os.environ.get("SLURM_NTASKS", 1)) > 1
    job = os.environ.get("SLURM_JOB_ID") if several else os.environ.get("TORCHELASTIC_RUN_ID")
    letters = random.Random(job if job not in (None, "none") else time.time_ns())
    version = "offline-" + "".join(letters.choices(string.ascii_lowercase + string.digits, k=8))
    os.environ[_VERSION] = version
    return version


def identity(cfg: DictConfig) -> dict[str, Any]:
    """The part of a configuration that makes a run this run, in plain values.

    Args:
        cfg: before the learning rate is multiplied by the number of devices, which may change.
    """
    return _identity(OmegaConf.to_container(cfg))


def _identity(cfg: dict[str, Any]) -> dict[str, Any]:
    """The same of a configuration in plain values; None where it lacks an entry."""
    same = {key: cfg.get(key) for key in _IDENTITY}
    data = {key: value for key, value in cfg["data"].items() if key not in _NOT_OF_IDENTITY}
    for holder, key in ((data, "train_path"), (same, "pretrained_feature_extractor")):
        if holder.get(key) is not None:
            holder[key] = str(Path(holder[key]).expanduser().resolve())
    return json.loads(json.dumps({**same, "dataset": cfg["data"]["dataset"], "data": data}))


def _recorded(args: dict[str, Any]) -> dict[str, Any]:
    """The identity of the run that wrote an args.json; entries that it did not record yet come from the rest of it."""
    recorded = args["identity"]
    if "data" in recorded:
        return recorded
    complete = {**_identity(args), **{key: value for key, value in recorded.items() if key != "custom_data"}}
    for holder, given, key in (
        (complete["data"], args["data"], "train_path"),
        (complete, args, "pretrained_feature_extractor"),
    ):
        if not Path(given.get(key) or "").is_absolute():
            holder.pop(key, None)  # relative to a folder that is not known any more
    return complete


def _contradiction(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first entry in which two identities differ, its full name and both values; None if they are the same run."""
    ours = {**ours, "data": dict(ours["data"])}
    for there, here, key in (
        (theirs, ours, "pretrained_feature_extractor"),
        (theirs["data"], ours["data"], "train_path"),
    ):
        if key not in there:
            here.pop(key, None)
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    return difference(keys[0], theirs.get(keys[0]), ours.get(keys[0])) if keys else None


def check_writable(folder: Path, option: str) -> None:
    """Make a folder, and see whether a file can be written there.

    Raises:
        UserError: it cannot; the sentence names the option that says where.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option}: nothing can be written to {folder}: {error.strerror}") from None


def claim_folder(folder: Path, resumed: Path | None) -> ExitStack:
    """Make a run's folder, and lock it for other processes than those of this run.

    Returns:
        What releases the lock when it is closed.

    Raises:
        UserError: it holds a checkpoint and this is not that run resumed, or another process writes to it.
    """
    check_writable(folder, "checkpoint.dir")
    with ExitStack() as lock:
        if first_process():
            lock.enter_context(locked_folder(folder))
        held = sorted(folder.glob("*.ckpt"))
        if held and (resumed is None or resumed.resolve().parent != folder.resolve()):
            raise UserError(
                f"{folder} holds a run already ({held[-1].name}); give another checkpoint.version, delete it, "
                "or go on from it with auto_resume.enabled=True and the same settings"
            )
        return lock.pop_all()


class _WholeFiles(WholeFiles, pl.plugins.io.TorchCheckpointIO):
    """Lightning's way to write checkpoints, with ours of making files."""


class Checkpointer(pl.Callback):
    """Saves a checkpoint every ``checkpoint.frequency`` epochs and after the last, and args.json at the start.

    Args:
        cfg: the configuration.
        folder: the run's folder.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(self, cfg: DictConfig, folder: Path, resumed: Path | None = None) -> None:
        self.cfg = cfg
        self.folder = folder
        self.resumed = resumed
        self._replaced: list[str] = []  # what this run has saved, and the next checkpoint replaces

    def state_dict(self) -> dict[str, Any]:
        """Names of the checkpoints that the next one replaces: a resumed run removes those and no others."""
        return {"replaced": list(self._replaced)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._replaced = list(state_dict["replaced"])

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Let the trainer write checkpoints that are whole or not there."""
        trainer.strategy.checkpoint_io = _WholeFiles()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write args.json."""
        self.write_args(trainer)

    def write_args(self, trainer: pl.Trainer) -> None:
        """Write the whole configuration, once and for all processes."""
        if trainer.is_global_zero:
            args = OmegaConf.to_container(self.cfg, resolve=True)
            args["wandb_run_id"] = self.folder.name if self.cfg.wandb.enabled else None
            write_json(self.folder / ARGS, args)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save, if it is time to."""
        epoch = trainer.current_epoch
        if (epoch + 1) % self.cfg.checkpoint.frequency == 0 or epoch + 1 == trainer.max_epochs:
            self.save(trainer, epoch)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{self.cfg.name}-{self.folder.name}-ep={epoch}.ckpt"

    def save_weights(self, model: torch.nn.Module) -> None:
        """Write a checkpoint of a network as it is, before any training: weights, and what they are of."""
        content = {"state_dict": model.state_dict(), _MARK: OmegaConf.to_container(self.cfg.identity)}
        save_whole(content, self._path(0))

    def save(self, trainer: pl.Trainer, epoch: int) -> None:
        """Save a checkpoint and, unless ``checkpoint.keep_prev``, remove the one before. All processes take part."""
        path = self._path(epoch)
        before = [name for name in self._replaced if name != path.name]
        self._replaced = [] if self.cfg.checkpoint.keep_prev else [*before, path.name]
        trainer.save_checkpoint(path)
        if trainer.is_global_zero and self._replaced:
            for name in before:
                (self.folder / name).unlink(missing_ok=True)
            self._replaced = [path.name]

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write into the checkpoint what it is of."""
        checkpoint[_MARK] = OmegaConf.to_container(self.cfg.identity)

    def how_to_go_on(self) -> str:
        """What a user does after this run was stopped."""
        # the newest on the disk: the signal may come right after it was written
        saved = _newest_first(self.folder.glob("*-ep=*.ckpt")) if self.cfg.checkpoint.enabled else []
        last = saved[0] if saved else self.resumed
        if last is None:
            return "there is no checkpoint yet; run the command again"
        if self.cfg.auto_resume.enabled:
            return f"run the command again to go on from {last}"
        return f"add \"++resume_from_checkpoint='{last}'\" to the command to go on"


def read_checkpoint(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, tensors and plain values only; code in it is neither run nor kept.

    Args:
        path: the file.
        to_resume: whether all of it is needed, not the weights alone.

    Raises:
        UserError: it is not there, broken or dangerous, or holds code where all is needed.
    """
    checkpoint, code = _read(path)
    if to_resume:
        _refuse_code(path, code)
    return checkpoint


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint; return its content and the names of the code in it."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        checkpoint, code = load_inert(path)
    except Exception as error:
        reason = "it was not written by torch.save, or holds code that may do harm"
        if isinstance(error, OSError | RuntimeError) and str(error).strip():
            reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{path} is no checkpoint of solo-learn: it has no state_dict")
    return checkpoint, code


def _refuse_code(path: Path, code: list[str]) -> None:
    if code:
        raise UserError(
            f"{path} holds code ({code[0]}, …), as solo-learn's own scripts write it: "
            "its weights can be evaluated, but training cannot go on from it"
        )


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint file at a path, or the newest one in a run's folder that can be read.

    Raises:
        UserError: there is none.
    """
    place = Path(place)
    if place.is_dir():
        found = _newest_first(place.glob("*.ckpt"))
        if not found:
            raise UserError(f"there is no checkpoint in {place}")
        if len(found) == 1:
            return found[0]  # there is no other; who reads it names it if it cannot be read
        readable = _first_readable(found)
        return readable[0] if readable else found[0]
    if not place.is_file():
        raise UserError(f"there is no checkpoint {place}")
    return place


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)


def _first_readable(paths: list[Path]) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Return the first checkpoint that can be read, its content and code; print a line for each one skipped."""
    for path in paths:
        try:
            return path, *_read(path)
        except UserError as error:
            say(f"skipped: {error}")
    return None


def check_resumable(path: Path, checkpoint: dict[str, Any], cfg: DictConfig, model: torch.nn.Module) -> int:
    """Check that a checkpoint is one of this method and this network.

    Args:
        path: the file, for messages.
        checkpoint: its content.
        cfg: the configuration.
        model: the network to be trained.

    Returns:
        The number of epochs it was trained for.

    Raises:
        UserError: the message names what differs.
    """
    mark = checkpoint.get(_MARK, {})
    here = OmegaConf.to_container(cfg.identity)
    for key in (*_STATE, "dataset"):
        if key in mark and mark[key] != here[key]:
            name, theirs, ours = difference(key, mark[key], here[key])
            raise UserError(f"{path} is a checkpoint of {name} {theirs}, this run trains {name} {ours}")
    theirs, ours = checkpoint["state_dict"], model.state_dict()
    theirs = {name: tensor for name, tensor in theirs.items() if name in ours or name not in LATE_BUFFERS}
    for name in (*sorted(set(ours) - set(theirs)), *sorted(set(theirs) - set(ours))):
        raise UserError(f"{path} is a checkpoint of another network: {name} is in only one of the two")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape:
            shapes = f"{tuple(theirs[name].shape)} there, {tuple(tensor.shape)} here"
            raise UserError(f"{path} is a checkpoint of another network: {name} is {shapes}")
    try:
        return checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    except KeyError:
        raise UserError(f"{path} holds weights only; training cannot go on from it") from None


def auto_resume(cfg: DictConfig, kind: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest readable checkpoint of the same run and its content, or None.

    It must not be older than ``auto_resume.max_hours``. The same run has the same :func:`identity`. With
    ``checkpoint.version`` its ``max_epochs`` may differ: the run becomes longer or shorter.

    Args:
        cfg: the configuration.
        kind: the method's name, or "linear".

    Raises:
        UserError: ``checkpoint.version`` names another run, the same run is in progress, or the checkpoint holds code.
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
            theirs, ours = _recorded(json.loads(args.read_text())), OmegaConf.to_container(cfg.identity)
            if version is not None:
                ours["max_epochs"] = theirs["max_epochs"]
            other = _contradiction(theirs, ours)
        except (ValueError, KeyError, TypeError):
            continue  # args.json of something else
        if other is None:
            found += checkpoints
        elif version is not None:
            name, there, here = other
            raise UserError(
                f"{args.parent} holds another run: {name} is {there} there, {here} here; "
                "give another checkpoint.version, or the settings of that run"
            )
    if first_process():
        for folder in {path.parent for path in found}:
            with locked_folder(folder):  # a run in progress replaces its checkpoints
                pass
    readable = _first_readable(_newest_first(found))
    if readable is None:
        return None
    path, checkpoint, code = readable
    _refuse_code(path, code)
    return path, checkpoint


def resume_point(cfg: DictConfig, kind: str, folder: Path, model: torch.nn.Module) -> tuple[Path, Path | None, int]:
    """Where a run goes on: its folder, the checkpoint or None, and the epochs that lie behind it.

    Args:
        cfg: the configuration: ``resume_from_checkpoint`` names a checkpoint, else ``auto_resume`` may find one.
        kind: the method's name, or "linear".
        folder: where the run would write if it began anew.
        model: what would be trained.

    Raises:
        UserError: the checkpoint is of something else.
    """
    if cfg.resume_from_checkpoint:
        found = Path(cfg.resume_from_checkpoint)
        checkpoint = read_checkpoint(found, to_resume=True)
    elif cfg.auto_resume.enabled and (newest := auto_resume(cfg, kind)) is not None:
        found, checkpoint = newest
    else:
        return folder, None, 0
    epochs = check_resumable(found, checkpoint, cfg, model)
    if epochs > cfg.max_epochs:
        raise UserError(f"{found} has {epochs} epochs behind it, more than max_epochs={cfg.max_epochs}")
    say(f"resuming after epoch {epochs} of {cfg.max_epochs} from {found}")
    return (folder if cfg.checkpoint.version else found.parent), found, epochs


def load_backbone(place: str | Path, backbone: torch.nn.Module) -> None:
    """Load the backbone of a checkpoint, strictly.

    Args:
        place: a checkpoint, or the folder of a run.
        backbone: what it is loaded into.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    path = find_checkpoint(place)
    state = plain_names(read_checkpoint(path)["state_dict"])
    # 1.0.2 called it encoder
    weights = {}
    for prefix in ("backbone.", "encoder."):
        weights.update({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    weights = plain_names(weights)
    if not weights:
        raise UserError(f"{path} holds no backbone")
    if reason := mismatch(weights, backbone.state_dict()):
        raise UserError(f"{path} holds another backbone: {reason}")
    backbone.load_state_dict(weights)
