"""Load the checkpoint of a run, and check that it belongs to the same run."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule

from lightly_ext.benchmarks.setup import Setup
from plugins.spelling import counted
from plugins.tools.command import UserError
from plugins.tools.fitting import mismatch
from plugins.tools.records import difference

# Options that change the images, the objective or the optimisation. --epochs may change: a run can be made longer.
_IDENTITY = (
    *("train_dir", "batch_size_per_device", "seed", "input_size", "normalize", "transform"),
    *(
        "backbone",
        "backbone_option",
        "small_images",
        "option",
        "optimizer",
        "lr",
        "weight_decay",
        "decay_all",
        "warmup_epochs",
    ),
)


def identity(setup: Setup, name: str) -> dict[str, Any]:
    """Return the options that identify the pre-training of a method, as plain values."""
    config = setup.config()
    train_dir = str(setup.options.train_dir.resolve())
    return {**{key: config[key] for key in _IDENTITY}, "method": name, "train_dir": train_dir}


def load(path: Path, name: str, model: LightningModule) -> dict[str, Any]:
    """Load the weights of a checkpoint into a model.

    Args:
        path: the checkpoint.
        name: name of the model's method.
        model: the model that receives the weights.

    Returns:
        The content of the checkpoint.

    Raises:
        UserError: the file is not a checkpoint of Lightning, or it belongs to another model.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, EOFError):
        raise UserError(f"--ckpt-path: {path} is not a checkpoint of Lightning") from None
    # a memory of images has no rows until a state dict or the training set gives their number
    wanted = {key: value if value.numel() else state.get(key, value) for key, value in model.state_dict().items()}
    if reason := mismatch(state, wanted):
        raise UserError(
            f"--ckpt-path: {path} has another method, backbone or options than this run of {name}: {reason}"
        )
    model.load_state_dict(state)
    return checkpoint


def check_same_run(setup: Setup, name: str, checkpoint: Mapping[str, Any]) -> int:
    """Check that a pre-training is resumed from a checkpoint of the same run.

    A checkpoint of an earlier release has no identity and is not compared. With --epochs 0, the checkpoint is only
    evaluated.

    Returns:
        The number of completed epochs; 0 if the checkpoint is only evaluated.

    Raises:
        UserError: the checkpoint belongs to a run with other settings, or has more epochs.
    """
    path, epochs = setup.options.ckpt_path, setup.options.epochs
    if epochs == 0:
        return 0
    if (completed := checkpoint.get("epoch", -1) + 1) > epochs:
        raise UserError(
            f"--ckpt-path: {path} was trained for {counted(completed, 'epoch')}, more than --epochs {epochs}"
        )
    theirs = checkpoint.get("callbacks", {}).get("EpochRecord", {}).get("identity", {})
    ours = identity(setup, name)
    for key in theirs:
        if theirs[key] != ours.get(key):
            option, recorded, given = difference(key, theirs[key], ours.get(key))
            raise UserError(
                f"--ckpt-path: {path} belongs to a run with other settings: {option} is {recorded} there, and {given} "
                "in this run; use the settings of that run, or start a new run without --ckpt-path"
            )
    return completed
