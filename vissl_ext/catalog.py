"""Image folders given on the command line, without an entry in VISSL's dataset catalogue.

Only ``config.DATA.TRAIN.DATA_PATHS=[FOLDER]`` is required. The content of the folder determines the data source.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torchvision.datasets.folder import is_image_file
from vissl.data.dataset_catalog import VisslDatasetCatalog

from plugins.tools.command import UserError
from plugins.tools.files import atomic
from plugins.tools.folders import check_same_classes, class_names, walk
from vissl_ext.compat.safe_files import load_file

_FILES = ("disk_folder", "disk_filelist")
_NOT_FILES = ("synthetic", "torchvision_dataset", "airstore")
"""Data sources for which a path is not a folder of images."""
_DIGITS = "; create the digits with: python -m plugins.tools.data digits"


def complete(config: DictConfig, given: dict[str, Any], *, same_classes: bool = True) -> dict[str, list[str]]:
    """Set the data sources for the folders in DATA_PATHS.

    A folder with one subfolder per class becomes ``disk_folder``. A folder that contains images becomes
    ``disk_filelist``; :func:`write_lists` writes its list. Labels are read if the configuration has ``LABEL_SOURCES``.

    Args:
        config: VISSL's configuration, below ``config``; changed in place.
        given: overrides of the command line, key below ``config`` → value.
        same_classes: whether the folders of training and test images must have the same classes. An extraction of
            features does not require it.

    Returns:
        Path of each list to be written → paths of its images.

    Raises:
        UserError: a path does not exist or contains no images, labels are missing, or the folders of training and test
            images have different classes.
    """
    lists: dict[str, list[str]] = {}
    splits = [*([] if config.TEST_ONLY else ["TRAIN"]), *(["TEST"] if config.TEST_MODEL else [])]
    for split in splits:
        data = config.DATA[split]
        if not OmegaConf.is_list(data.DATA_PATHS):
            raise UserError(f"config.DATA.{split}.DATA_PATHS must be a list, [FOLDER], got {data.DATA_PATHS!r}")
        if len(data.DATA_PATHS) == 0:
            _check_names(split, data)
            continue
        if any(source in _NOT_FILES for source in data.DATA_SOURCES) and not _replaced(split, data, given):
            continue
        paths, sources, names = [], [], []
        for index, path in enumerate(map(str, data.DATA_PATHS)):
            path = str(Path(path).expanduser())
            source, images = _kind(split, path)
            if source == "disk_filelist" and images is not None:
                path = str(Path(config.CHECKPOINT.DIR) / f"{split.lower()}_images_{index}.npy")
                lists[path] = images
            paths.append(path)
            sources.append(source)
            names.append(_name(split, data, index, path))
        if f"DATA.{split}.DATA_SOURCES" in given and list(data.DATA_SOURCES) != sources:
            raise UserError(
                f"config.DATA.{split}.DATA_SOURCES is {list(data.DATA_SOURCES)}, but DATA_PATHS needs {sources}"
            )
        labelled = len(data.LABEL_SOURCES) > 0 and len(data.LABEL_PATHS) == 0
        if labelled and any(
            source == "disk_filelist" and not VisslDatasetCatalog.has_data(name)
            for name, source in zip(names, sources, strict=True)
        ):
            raise UserError(
                f"config.DATA.{split}.LABEL_SOURCES needs labels, but {data.DATA_PATHS[0]} has no class folders"
            )
        data.DATA_PATHS, data.DATA_SOURCES, data.DATASET_NAMES = paths, sources, names
        if labelled and "disk_folder" in sources:
            data.LABEL_SOURCES = sources
    if same_classes:
        _check_classes([config.DATA[split] for split in splits])
    return lists


def _check_classes(splits: list[Any]) -> None:
    """Check that a label means the same class in the folders of training and test images."""
    splits = [data for data in splits if data.LABEL_TYPE == "standard"]  # otherwise the folders are not the labels
    of_folders = [data for data in splits if list(data.LABEL_SOURCES) == ["disk_folder"] and not data.LABEL_PATHS]
    places = [path for data in of_folders if list(data.DATA_SOURCES) == ["disk_folder"] for path in data.DATA_PATHS]
    if len(of_folders) == len(places) == 2 and all(Path(place).is_dir() for place in places):
        train, val = places
        check_same_classes(train, class_names(train), val, class_names(val))


def class_count(data: Any) -> int:
    """Return the number of classes of a split.

    Args:
        data: the section DATA.TRAIN or DATA.TEST, after :func:`complete`.

    Returns:
        The number of class folders, or the largest label of a .npy file plus one; 0 if neither is known.

    Raises:
        UserError: a .npy file cannot be read, or contains objects.
    """
    counts = [0]
    if not data.LABEL_PATHS and data.LABEL_SOURCES:
        for path, source in zip(data.DATA_PATHS, data.DATA_SOURCES, strict=False):
            if source == "disk_folder" and Path(path).is_dir():
                counts.append(sum(entry.is_dir() for entry in os.scandir(path)))
    for path in data.LABEL_PATHS:
        if str(path).endswith(".npy") and Path(path).is_file():
            labels = load_file(str(path), "r")
            if labels.size and np.issubdtype(labels.dtype, np.integer):
                counts.append(int(labels.max()) + 1)
    return max(counts)


def write_lists(lists: dict[str, list[str]]) -> None:
    """Write the lists of images that :func:`complete` returns."""
    for path, images in lists.items():
        with atomic(Path(path)) as file:
            np.save(file, np.array(images))


def register(config: Any) -> None:
    """Register the paths of a completed configuration in VISSL's catalogue; each process of a run must call it.

    Args:
        config: VISSL's configuration, below ``config``.
    """
    for split in ("TRAIN", "TEST"):
        data = config.DATA[split]
        if len(data.DATA_PATHS) != len(data.DATASET_NAMES):
            continue
        for name, path, source in zip(data.DATASET_NAMES, data.DATA_PATHS, data.DATA_SOURCES, strict=False):
            added = str(name).startswith(f"{split.lower()}:")  # by _name
            if added and not VisslDatasetCatalog.has_data(name):
                entry = [path, path if source == "disk_folder" else ""]
                VisslDatasetCatalog.register_data(name, {"train": entry, "val": entry})


def _replaced(split: str, data: DictConfig, given: dict[str, Any]) -> bool:
    """Return whether the command line replaces a data set of torchvision by folders of images."""
    keys = {f"DATA.{split}.{name}" for name in ("DATA_PATHS", "DATA_SOURCES")}
    if keys & given.keys() != {f"DATA.{split}.DATA_PATHS"} or set(data.DATA_SOURCES) != {"torchvision_dataset"}:
        return False
    try:
        for path in data.DATA_PATHS:
            _kind(split, str(Path(str(path)).expanduser()))
    except UserError:
        return False  # the folder of torchvision's data set
    return True


def _check_names(split: str, data: DictConfig) -> None:
    hint = f"set a folder with config.DATA.{split}.DATA_PATHS=[FOLDER]"
    if len(data.DATA_SOURCES) == 0:
        unless = "set config.TEST_MODEL=false" if split == "TEST" else "set DATA_SOURCES"
        raise UserError(f"config.DATA.{split} has no data; {hint}, or {unless}")
    for source, name in zip(data.DATA_SOURCES, data.DATASET_NAMES, strict=False):
        if source not in _FILES:
            continue
        if not VisslDatasetCatalog.has_data(name):
            raise UserError(f"config.DATA.{split}.DATASET_NAMES: {name!r} is in no data set catalogue; {hint}")
        place = VisslDatasetCatalog.get(name)["train" if split == "TRAIN" else "val"][0]
        if isinstance(place, str) and not Path(place).exists():
            raise UserError(f"the data set catalogue has {place} for {name!r}, which does not exist; {hint}")


def _name(split: str, data: DictConfig, index: int, path: str) -> str:
    """Return the configured name if the catalogue has it, because its labels may be needed, else a new name."""
    if index < len(data.DATASET_NAMES) and VisslDatasetCatalog.has_data(data.DATASET_NAMES[index]):
        return data.DATASET_NAMES[index]
    return f"{split.lower()}:{path}"


def _kind(split: str, given: str) -> tuple[str, list[str] | None]:
    """Return the data source for a path, and its images if a list of them must be written."""
    path = Path(given)
    if path.is_file() and path.suffix == ".npy":
        return "disk_filelist", None
    if not path.is_dir():
        hint = _DIGITS if path.parent.name == "digits" else ""
        raise UserError(f"config.DATA.{split}.DATA_PATHS: {given} is neither a folder nor a .npy list of images{hint}")
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    if not any(is_image_file(entry.name) for entry in os.scandir(path)):
        if {"train", "val"} <= set(folders):
            raise UserError(f"config.DATA.{split}.DATA_PATHS: {given} contains train and val; choose one of the two")
        if folders:
            empty = [name for name in folders if not any(_images(path / name))]
            if empty:
                raise UserError(f"config.DATA.{split}.DATA_PATHS: there is no image in {path / empty[0]}")
            return "disk_folder", None
    images = sorted(_images(path))
    if not images:
        raise UserError(f"config.DATA.{split}.DATA_PATHS: there is no image in {given}")
    return "disk_filelist", images


def _images(folder: Path) -> Any:
    for place, names in walk(folder.resolve()):
        for name in names:
            if is_image_file(name):
                yield f"{place}/{name}"
