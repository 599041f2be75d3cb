"""Functions that main_knn, main_probe and main_umap share: load the network of a run, and extract features."""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from plugins.methods import METHODS
from plugins.patches import see_patches_
from plugins.tools.bad_images import BadImages, LeavingOut, describe
from plugins.tools.command import UserError, did_you_mean
from plugins.tools.features import usable_device
from plugins.tools.fitting import load_fitting, plain_names
from plugins.tools.records import read_json
from solo_ext.backbones import build_backbone
from solo_ext.checkpoint import ARGS, check_writable, find_checkpoint, load_backbone, read_checkpoint
from solo_ext.compat import native_methods, native_options
from solo_ext.datasets import DOWNLOADED, check_same_classes, image_dataset, preparation_hint
from solo_ext.launch import as_user_error
from solo_ext.loaders import evaluation_loader
from solo_ext.registry import method_class
from solo_ext.transforms import DATASETS, evaluation_side, evaluation_transform

Extractor = Callable[[Tensor], dict[str, Tensor]]
"""Maps images ``[B, 3, H, W]`` to features ``[B, D]`` by name: "backbone" and, if requested, "projector"."""

_DATA_DEFAULTS = {"num_classes": 2, "num_large_crops": 2, "num_small_crops": 0}
_RENAMED = {"encoder.": "backbone.", "momentum_encoder.": "momentum_backbone."}
"""Prefixes of weights in checkpoints of 1.0.2, and their names in main."""


class Run(NamedTuple):
    """A pre-training in a folder.

    Args:
        checkpoint: its newest checkpoint, or that of the chosen epoch.
        config: its configuration in the format of solo-learn's main branch.
    """

    checkpoint: Path
    config: dict[str, Any]

    @property
    def view(self) -> dict[str, Any]:
        """The first entry of ``augmentations``, with ``crop_size``, ``mean`` and ``std``."""
        views = self.config.get("augmentations") or self.config["data"].get("augmentations") or {}
        return dict(views[0] if isinstance(views, list) else views)

    @property
    def patches(self) -> tuple[int, int] | None:
        """Side and distance of the patches of which evaluation sees the mean; None if it sees whole images."""
        return evaluated_patches(self.config)

    @property
    def crop_size(self) -> int:
        """Side of the training images in pixels."""
        return evaluation_side(self.view, self.config["data"].get("dataset"))


def read_run(folder: Path, epoch: int | None = None) -> Run:
    """Read the configuration of a run, and find its checkpoint.

    Args:
        folder: the run's folder.
        epoch: number in the name of the checkpoint; None selects the newest.

    Raises:
        UserError: the folder has no valid args.json or no such checkpoint.
    """
    config = read_config(folder)
    return Run(find_checkpoint(folder, epoch), config)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the args.json of a run, in our format, that of solo-learn's main branch, or the flat one until 1.0.5.

    Args:
        folder: the run's folder.

    Returns:
        The configuration in the format of solo-learn's main branch.

    Raises:
        UserError: the folder has no valid args.json.
    """
    path = folder / ARGS
    if not path.is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no {ARGS}")
    try:
        config = read_json(path)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if isinstance(config, dict) and isinstance(config.get("dataset"), str):
        config = _nested(config)
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("backbone", "data")):
        raise UserError(f"{path} was not written by solo-learn: it has no sections backbone and data")
    return config


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Convert the entries that define a network from the flat args.json of solo-learn until 1.0.5 to main's format."""
    name, method = flat.get("encoder", flat.get("backbone")), flat.get("method")
    if not isinstance(name, str):
        return {}
    kwargs = {key: value for key, value in (flat.get("backbone_args") or {}).items() if key != "cifar"}
    sizes = flat.get("crop_size", 224)
    view = {"crop_size": sizes[0] if isinstance(sizes, list) else sizes}
    view.update({key: flat[key] for key in ("mean", "std") if key in flat})
    known = native_options(method) if method in native_methods() else ()
    rates = {key: flat.get(key, 0.0) for key in ("lr", "weight_decay", "classifier_lr")}
    return {
        "method": method,
        "backbone": {"name": name, "kwargs": kwargs},
        "data": {
            "dataset": flat["dataset"],
            **{key: flat.get(key, value) for key, value in _DATA_DEFAULTS.items()},
        },
        "augmentations": [view],
        "max_epochs": flat.get("max_epochs", 1),
        "optimizer": {"name": "sgd", "batch_size": flat.get("batch_size", 1), **rates},
        "momentum": {"classifier": bool(flat.get("momentum_classifier"))},
        "method_kwargs": {key: value for key, value in flat.items() if key in known and value is not None},
    }


def evaluated_patches(config: dict[str, Any]) -> tuple[int, int] | None:
    """Read from the configuration of a pre-training whether the backbone is evaluated on patches.

    Returns:
        Side and distance of the patches in pixels, or None for whole images.
    """
    spec = METHODS.get(str(config.get("method")))
    if spec is None or spec.name in native_methods():
        return None
    try:
        return spec.eval_patches(spec.resolve(config.get("method_kwargs") or {}))
    except ValueError:  # of another release
        return None


def extractor(run: Run, device: torch.device, *, projector: bool) -> Extractor:
    """Load the network of a run's checkpoint.

    Args:
        run: the run.
        device: the device to compute on.
        projector: whether to compute projections too.

    Raises:
        UserError: the checkpoint contains another network, or no projector.
    """
    if projector:
        method = _load_method(run).to(device).eval()

        def extract(images: Tensor) -> dict[str, Tensor]:
            out = method(images)
            if "z" not in out:
                raise UserError(f"{run.checkpoint} has no projector; use --feature_type backbone")
            return {"backbone": out["feats"], "projector": out["z"]}

        return extract
    entry = run.config["backbone"]
    backbone = build_backbone(entry["name"], entry.get("kwargs") or {}, run.config["data"]["dataset"], run.crop_size)
    load_backbone(run.checkpoint, backbone)
    if run.patches is not None:
        see_patches_(backbone, *run.patches)
    backbone.to(device).eval()
    return lambda images: {"backbone": backbone(images)}


def _load_method(run: Run) -> torch.nn.Module:
    """Load the method of a checkpoint, with its projector."""
    cfg = OmegaConf.create(run.config)
    if not cfg.get("method"):
        raise UserError(f"{run.checkpoint} has no projector; use --feature_type backbone")
    with as_user_error("the method"):
        method = method_class(cfg)(cfg)
    weights = {}
    for name, value in plain_names(read_checkpoint(run.checkpoint)["state_dict"]).items():
        old = next((prefix for prefix in _RENAMED if name.startswith(prefix)), "")
        weights[_RENAMED.get(old, "") + name[len(old) :]] = value
    wanted = method.state_dict()
    # other parts of the checkpoint, such as an online classifier, are ignored
    parts = {name.partition(".")[0] for name in wanted}
    weights = {name: value for name, value in weights.items() if name in wanted or name.partition(".")[0] in parts}
    load_fitting(method, weights, run.checkpoint, "network")
    return method


def open_images(args: argparse.Namespace, run: Run, *, need_labels: bool) -> dict[str, Dataset]:
    """Open the training and validation images that the command line selects, with the evaluation transform.

    Args:
        args: the options of ``main_knn.add_arguments``.
        run: the run; it gives the crop size and, for custom data, mean and standard deviation.
        need_labels: whether a folder without class folders is an error; otherwise its images are unlabelled.

    Returns:
        {"train": images, "val": images}; "val" is missing if there is no path to validation images.

    Raises:
        UserError: an option is invalid, a path is missing, or the classes differ.
    """
    if args.dataset not in DATASETS:
        near = did_you_mean(args.dataset, DATASETS)
        raise UserError(f"unknown --dataset {args.dataset!r}; choose from {', '.join(sorted(DATASETS))}{near}")
    if not (args.data_fraction == -1 or 0 < args.data_fraction < 1):
        raise UserError(f"--data_fraction must be in (0, 1), or -1 for all images, got {args.data_fraction}")
    if args.no_labels and args.dataset != "custom":
        raise UserError(f"--no_labels needs --dataset custom, got {args.dataset}")
    given = {key: getattr(args, key) for key in ("mean", "std") if getattr(args, key)}
    transform = evaluation_transform(args.dataset, run.crop_size, {**run.view, **given})
    downloaded = args.dataset in DOWNLOADED
    paths = {"train": args.train_data_path, "val": args.val_data_path}
    if downloaded and paths["val"] is None:
        paths["val"] = paths["train"]
    paths = {split: path for split, path in paths.items() if path is not None}
    for split, path in paths.items():
        if args.data_format == "h5" and not downloaded:
            if not Path(path).is_file():
                raise UserError(f"--{split}_data_path is not a file: {path}")
        elif not downloaded and not Path(path).is_dir():
            raise UserError(f"--{split}_data_path is not a folder: {path}{preparation_hint(args.dataset)}")
    labels_optional = args.dataset == "custom" and args.data_format != "h5" and not need_labels
    found = {}
    for split, path in paths.items():
        found[split] = image_dataset(
            *(args.dataset, path, split, transform),
            indexed=False,
            no_labels=args.no_labels or (labels_optional and not any(entry.is_dir() for entry in Path(path).iterdir())),
            data_format=args.data_format,
            fraction=args.data_fraction if split == "train" else -1,
        )
        if args.skip_bad_images:
            found[split] = LeavingOut(found[split], BadImages(Path(tempfile.mkdtemp())))
    check_same_classes(found["train"], found.get("val"))
    return found


def open_evaluation(args: argparse.Namespace, why: str) -> tuple[Run, torch.device, dict[str, Dataset]]:
    """Open the run, the device and the labelled images of an evaluation.

    Args:
        args: the options of ``main_knn.add_arguments``, and ``output``.
        why: why the command needs labels, for the error message.

    Raises:
        UserError: an option is invalid, a path is missing, or there are no labels or no validation images.
    """
    if args.output is not None:
        check_writable(args.output.parent, "--output")
    if args.no_labels:
        raise UserError(f"{why}: remove --no_labels")
    run, device = read_run(Path(args.pretrained_checkpoint_dir), args.epoch), usable_device(args.device)
    images = open_images(args, run, need_labels=True)
    if "val" not in images:
        raise UserError("--val_data_path is missing: set it to the folder of the validation images")
    return run, device, images


def class_names(images: Dataset) -> list[str]:
    """Return the names of the classes, in the order of their labels; an empty list without labels."""
    while isinstance(images, Subset):
        images = images.dataset
    return list(getattr(images, "classes", []))


def _print_left_out(images: Dataset, title: str) -> None:
    """Print the images that LeavingOut has left out, and delete their record."""
    while isinstance(images, Subset):
        if isinstance(images, LeavingOut):
            if names := images.bad.names():
                print(f"{title}: {describe(names)}", flush=True)
            if images.bad.folder is not None:
                shutil.rmtree(images.bad.folder, ignore_errors=True)
        images = images.dataset


@torch.no_grad()
def collect(
    images: Dataset, extract: Extractor, device: torch.device, *, batch_size: int, workers: int, title: str
) -> dict[str, Tensor]:
    """Compute the features of all images, with a progress bar.

    Args:
        images: a dataset of (image, label).
        extract: the network.
        device: the device to compute on.
        batch_size: batch size.
        workers: number of worker processes of the data loader.
        title: title of the progress bar.

    Returns:
        Features ``[N, D]`` by name, and "labels" ``[N]``, on the CPU. Images that LeavingOut leaves out have no row; a
        line names them.

    Raises:
        UserError: an image cannot be read.
    """
    loader = evaluation_loader(images, batch_size, workers)
    found: dict[str, list[Tensor]] = {}
    for batch, labels in tqdm(loader, desc=title, disable=None):
        for name, rows in {**extract(batch.to(device)), "labels": labels}.items():
            found.setdefault(name, []).append(rows.cpu())
    _print_left_out(images, title)
    return {name: torch.cat(parts) for name, parts in found.items()}
