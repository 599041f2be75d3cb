"""Checkpoints: where they lie, what they are checked for before training goes on from them.

As solo-learn lays them out: ``<checkpoint.dir>/<method>/<version>/<name>-<version>-ep=<epoch>.ckpt`` with the whole
configuration beside it in args.json. Lightning writes to a temporary file first, so that a kill leaves the old one.
"""

import json
import os
import random
import string
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from plugins.tools.command import UserError, first_process, say
from plugins.tools.fitting import mismatch, plain_names
from plugins.tools.records import difference, write_json
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
    "finetune",
    "normalized_classifier",
)
# What makes a run the same run beside. Other folders, devices, logging and the like may change.
_IDENTITY = (*_STATE, "name", "augmentations", "max_epochs", "seed", "pretrained_feature_extractor")


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
    same = {key: OmegaConf.select(cfg, key) for key in _IDENTITY}
    same = {key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in same.items()}
    folder = str(Path(cfg.data.train_path).resolve()) if cfg.data.dataset == "custom" else None
    return json.loads(json.dumps({**same, "dataset": cfg.data.dataset, "custom_data": folder}))


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


def claim_folder(folder: Path, resumed: Path | None) -> None:
    """Refuse to train into a folder that holds another run.

    Raises:
        UserError: it holds a checkpoint, and this is not that run resumed.
    """
    check_writable(folder, "checkpoint.dir")
    held = sorted(folder.glob("*.ckpt"))
    if held and (resumed is None or resumed.resolve().parent != folder.resolve()):
        raise UserError(
            f"{folder} holds a run already ({held[-1].name}); give another checkpoint.version, delete it, "
            "or go on from it with auto_resume.enabled=True and the same settings"
        )


class Checkpointer(pl.Callback):
    """Saves a checkpoint every ``checkpoint.frequency`` epochs and after the last, and args.json at the start.

    Args:
        cfg: the configuration.
        folder: the run's folder.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.cfg = cfg
        self.folder = folder

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

    def save_weights(self, model: torch.nn.Module) -> None:
        """Write a checkpoint of a network as it is, before any training: weights, and what they are of."""
        path = self.folder / f"{self.cfg.name}-{self.folder.name}-ep=0.ckpt"
        temporary = path.with_suffix(".tmp")
        torch.save({"state_dict": model.state_dict(), _MARK: OmegaConf.to_container(self.cfg.identity)}, temporary)
        temporary.replace(path)

    def save(self, trainer: pl.Trainer, epoch: int) -> None:
        """Save a checkpoint and, unless ``checkpoint.keep_prev``, remove the one before. All processes take part."""
        path = self.folder / f"{self.cfg.name}-{self.folder.name}-ep={epoch}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero and not self.cfg.checkpoint.keep_prev:
            for old in self.folder.glob("*.ckpt"):
                if old != path:
                    old.unlink()

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write into the checkpoint what it is of."""
        checkpoint[_MARK] = OmegaConf.to_container(self.cfg.identity)


def read_checkpoint(path: Path, *, to_resume: bool = False) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU, tensors and plain values only; code in it is neither run nor kept.

    Args:
        path: the file.
        to_resume: whether all of it is needed, not the weights alone.

    Raises:
        UserError: it is not there, broken or dangerous, or holds code where all is needed.
    """
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
    if to_resume and code:
        raise UserError(
            f"{path} holds code ({code[0]}, …), as solo-learn's own scripts write it: "
            "its weights can be evaluated, but training cannot go on from it"
        )
    return checkpoint


def find_checkpoint(place: str | Path) -> Path:
    """The checkpoint file at a path, or the newest one in a run's folder.

    Raises:
        UserError: there is none.
    """
    place = Path(place)
    if place.is_dir():
        found = sorted(place.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise UserError(f"there is no checkpoint in {place}")
        return found[-1]
    if not place.is_file():
        raise UserError(f"there is no checkpoint {place}")
    return place


def check_resumable(path: Path, cfg: DictConfig, model: torch.nn.Module) -> int:
    """Refuse a checkpoint of another method or another network.

    Returns:
        How many epochs it has behind it.

    Raises:
        UserError: the sentence says what differs.
    """
    checkpoint = read_checkpoint(path, to_resume=True)
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


def auto_resume(cfg: DictConfig, kind: str) -> Path | None:
    """The newest checkpoint of the same run, not older than ``auto_resume.max_hours``, or None.

    The same run has the same name, seed, method, options, teacher, network, augmentations and optimisation, and the
    same ``checkpoint.version`` if one is given. solo-learn compares neither the options nor the teacher, and so resumes
    one method from another's checkpoint.

    Args:
        cfg: the configuration.
        kind: the method's name, or "linear".
    """
    oldest = time.time() - cfg.auto_resume.max_hours * 3600
    found = []
    runs = Path(cfg.checkpoint.dir) / (cfg.checkpoint.group or kind)
    for args in runs.glob(f"{cfg.checkpoint.version or '*'}/{ARGS}"):
        checkpoints = sorted(args.parent.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        if not checkpoints or checkpoints[-1].stat().st_mtime < oldest:
            continue
        try:
            theirs = json.loads(args.read_text())["identity"]
        except (ValueError, KeyError):
            continue  # args.json of something else
        if theirs == OmegaConf.to_container(cfg.identity):
            found.append(checkpoints[-1])
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


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
    found = cfg.resume_from_checkpoint or (auto_resume(cfg, kind) if cfg.auto_resume.enabled else None)
    if found is None:
        return folder, None, 0
    found = Path(found)
    epochs = check_resumable(found, cfg, model)
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
