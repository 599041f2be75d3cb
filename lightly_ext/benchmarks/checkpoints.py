"""The checkpoint of a run: loading it, and telling runs apart."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule

from lightly_ext.benchmarks.setup import Setup
from plugins.tools.command import UserError
from plugins.tools.fitting import mismatch
from plugins.tools.records import difference

# Options that change the images, the objective or the optimisation. --epochs may change: a run can be made longer.
_IDENTITY = (
    *("train_dir", "batch_size_per_device", "seed", "input_size", "normalize", "transform"),
    *("backbone", "small_images", "option", "optimizer", "lr", "weight_decay", "decay_all", "warmup_epochs"),
)


def identity(setup: Setup, name: str) -> dict[str, Any]:
    """Return what makes the pre-training of a method this one, in plain values."""
    config = setup.config()
    train_dir = str(setup.options.train_dir.resolve())
    return {**{key: config[key] for key in _IDENTITY}, "method": name, "train_dir": train_dir}


def load(path: Path, name: str, model: LightningModule) -> dict[str, Any]:
    """Load the weights of a checkpoint into a model.

    Args:
        path: of the checkpoint.
        name: of the model's method.
        model: receives the weights.

    Returns:
        The checkpoint.

    Raises:
        UserError: it is no checkpoint, or one of another model.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError):
        raise UserError(f"--ckpt-path: {path} is no checkpoint of Lightning") from None
    # a memory of images has no rows until a state dict or the training set gives their number
    wanted = {key: value if value.numel() else state.get(key, value) for key, value in model.state_dict().items()}
    if reason := mismatch(state, wanted):
        raise UserError(f"--ckpt-path: {path} is of another method, backbone or options than {name}'s here: {reason}")
    model.load_state_dict(state)
    return checkpoint


def check_same_run(setup: Setup, name: str, checkpoint: Mapping[str, Any]) -> int:
    """Check that a pre-training continues from a checkpoint of the same run.

    A checkpoint of an earlier release has no identity. With --epochs 0 the checkpoint is evaluated, not continued.

    Returns:
        The number of epochs that are done; 0 if the checkpoint is evaluated.

    Raises:
        UserError: it is of another run, or has more epochs.
    """
    path, epochs = setup.options.ckpt_path, setup.options.epochs
    if epochs == 0:
        return 0
    if (behind := checkpoint.get("epoch", -1) + 1) > epochs:
        raise UserError(f"--ckpt-path: {path} has {behind} epochs behind it, more than --epochs {epochs}")
    theirs = checkpoint.get("callbacks", {}).get("EpochRecord", {}).get("identity", {})
    ours = identity(setup, name)
    for key in theirs:
        if theirs[key] != ours.get(key):
            where, there, here = difference(key, theirs[key], ours.get(key))
            raise UserError(
                f"--ckpt-path: {path} is of another run: {where} is {there} there, {here} here; "
                "give that run's settings, or begin anew without --ckpt-path"
            )
    return behind
