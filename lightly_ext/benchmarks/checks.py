"""Check the options that depend on files, on torchvision or on Lightning, before training starts."""

import importlib.util
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning import Trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from lightly_ext.benchmarks.checkpoints import check_same_run, load
from lightly_ext.benchmarks.methods import METHODS
from lightly_ext.benchmarks.schema import Options, flag
from lightly_ext.benchmarks.setup import Setup, first_line
from plugins.tools.command import UserError, did_you_mean
from plugins.tools.data import SUFFIXES
from plugins.tools.folders import check_same_classes, walk
from plugins.tools.images import with_path


def prepare(options: Options) -> Setup:
    """Check the options, and find the methods and classes that they select.

    Raises:
        UserError: an option is invalid, a path is missing, or a checkpoint belongs to another run.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for text in (".*Checkpoint directory .* exists and is not empty", ".*LeafSpec"):
        warnings.filterwarnings("ignore", message=text)  # the folder contains the lock, and Lightning's own code
    table = {**METHODS, **(_added(options.add) if options.add else {})}
    for name in options.methods or ():
        if name not in table:
            raise UserError(
                f"--methods: unknown method {name!r}; choose from {', '.join(sorted(table))}{did_you_mean(name, table)}"
            )
    setup = Setup(options, table, _classes(options))
    for folder in (options.log_dir, *options.log_dir.parents):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--log-dir: {folder} is a file, not a folder")
    path, number = options.ckpt_path, len(setup.methods)
    if path is not None and not path.is_file():
        reason = f"{path} is a folder; give the checkpoint in it" if path.is_dir() else f"there is no file {path}"
        raise UserError(f"--ckpt-path: {reason}")
    if path is not None and number != 1:
        raise UserError(f"--ckpt-path needs one method, got {number}; select it with --methods")
    for name in setup.methods:  # find an invalid option or backbone before the first method is trained
        if setup.is_ours(name):
            if options.epochs > 0:  # an evaluation does not use it
                _check_transform(setup, name)
            setup.model(name)
    if path is not None:
        (name,) = setup.methods
        checkpoint = load(path, name, setup.model(name))
        setup = replace(setup, epochs_before=check_same_run(setup, name, checkpoint))
    _check_trainer(options)
    return setup


def _added(path: Path) -> dict[str, dict[str, Any]]:
    """Import the METHODS dictionary of a Python file, which may import other files of its folder."""
    if not path.is_file():
        raise UserError(f"--add: there is no file {path}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"added_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--add: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = vars(module).get("METHODS")
    form = "{name: {'model': class, 'transform': transform}}"
    if not isinstance(table, dict) or not all(
        isinstance(entry, dict) and {"model", "transform"} <= set(entry) for entry in table.values()
    ):
        raise UserError(f"--add: {path} has no METHODS of the form {form}")
    return table


def _classes(options: Options) -> list[str]:
    """Check the images; return the classes of the training images."""
    train, held_out = (_images(name, getattr(options, name)) for name in ("train_dir", "val_dir"))
    classes, images = sorted(train), sum(train.values())
    check_same_classes(options.train_dir, train, options.val_dir, held_out)
    if len(classes) < 2:
        raise UserError(f"--train-dir must have at least two classes, got {len(classes)}: {options.train_dir}")
    batch = options.batch_size_per_device * options.devices
    if batch > images:
        raise UserError(f"--batch-size-per-device: a batch of {batch} exceeds the number of training images, {images}")
    if options.knn_k > images and not options.skip_knn_eval:
        raise UserError(f"--knn-k must not exceed the number of training images, {images}, got {options.knn_k}")
    return classes


def _images(name: str, folder: Path) -> dict[str, int]:
    """Count the images of each class."""
    if not folder.is_dir():
        raise UserError(f"{flag(name)}: there is no folder {folder}")
    counts = {
        path.name: sum(name.lower().endswith(tuple(SUFFIXES)) for _, names in walk(path) for name in names)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    if not sum(counts.values()):
        raise UserError(f"{flag(name)}: there are no images in class folders of {folder}")
    return counts


def _check_transform(setup: Setup, name: str) -> None:
    """Transform a black image, since invalid values of some arguments raise an error only when they are used.

    It has the path of a training image, which may have a mask.
    """
    files = (f"{place}/{file}" for place, files in walk(setup.options.train_dir) for file in files)
    image = Image.new("RGB", (setup.options.input_size, setup.options.input_size))
    try:
        setup.transform(name)(with_path(image, next(file for file in files if file.lower().endswith(SUFFIXES))))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--transform: {first_line(error)}") from None


def _check_trainer(options: Options) -> None:
    """Check that Lightning accepts the accelerator, devices, strategy and precision on this machine."""
    chosen = options.model_dump(include={"accelerator", "devices", "strategy", "precision"})
    try:
        Trainer(**chosen, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        given = " ".join(f"{flag(name)} {chosen[name]}" for name in ("accelerator", "devices", "strategy", "precision"))
        raise UserError(f"Lightning does not accept {given}: {first_line(error)}") from None
