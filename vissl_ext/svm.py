"""Engines ``svm`` and ``svm_low_shot``: linear support vector machines on extracted features, as for VOC07.

They replace VISSL's tools/train_svm.py, which needs a GPU and fails with current NumPy (vissl/utils/svm_utils/
svm_trainer.py:256), and tools/train_svm_low_shot.py, which fails for VOC07, since it calls the function in
extra_scripts/create_low_shot_samples.py:109 without one of its arguments. Settings and results are those of the tools,
see :mod:`plugins.tools.svm`, with these differences:

- The random numbers depend on ``SEED_VALUE``. VISSL's threads share an unseeded generator.
- Classifiers of an earlier command in the folder are not used again, since they may be those of another model.
  ``SVM.force_retrain`` has no effect.
- Images with one class each are allowed: one classifier is trained for each class. In the low-shot evaluation their
  features are extracted once, also for Places205, for which VISSL extracts them for each sample.
"""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from vissl.engines.engine_registry import register_engine
from vissl.utils.extract_features_utils import ExtractedFeaturesLoader

from plugins.tools import svm
from plugins.tools.command import UserError
from plugins.tools.folders import ImageFolder
from vissl_ext.compat.safe_files import load_file
from vissl_ext.features import LayerEngine


def svm_settings(config: Any) -> svm.Settings:
    """Return the settings of the classifiers.

    Args:
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a setting is invalid.
    """
    section = config.SVM
    costs, base = [float(cost) for cost in section.costs.costs_list], section.costs.base
    if base > 0:
        costs += [float(base) ** power for power in range(*section.costs.power_range)]
    settings = svm.Settings(
        costs=costs,
        loss=section.loss,
        penalty=section.penalty,
        dual=section.dual,
        max_iter=section.max_iter,
        folds=section.cross_val_folds,
        seed=int(config.SEED_VALUE),
        workers=max(int(config.DATA.NUM_DATALOADER_WORKERS), 1),
    )
    try:
        svm.check_settings(settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"config.SVM: {' '.join(str(error).split())}") from None
    return settings


def check_svm(engine: str, config: Any) -> None:
    """Validate the settings, and the training labels of .npy files or class folders.

    Args:
        engine: "svm" or "svm_low_shot".
        config: VISSL's configuration, below ``config``.

    Raises:
        UserError: a setting is invalid, there is no such file, or a class has too few images.
    """
    settings, shots, wanted = svm_settings(config), config.SVM.low_shot, list(config.SVM.cls_list)
    if not config.TEST_MODEL:
        raise UserError(f"engine_name={engine} classifies the test images: set config.TEST_MODEL=true")
    for key, values, least in (
        ("low_shot.k_values", shots.k_values, 1),
        ("low_shot.sample_inds", shots.sample_inds, 0),
        ("cls_list", [0, *wanted], 0),
    ):
        if not values or any(type(value) is not int or value < least for value in values):
            raise UserError(f"config.SVM.{key} must be a list of integers of at least {least}, got {list(values)}")
    for labels in _training_labels(config.DATA.TRAIN):
        targets = _columns(labels, wanted)
        if config.DATA.TRAIN.DATA_LIMIT > 0:
            continue  # some of the images are drawn
        if engine == "svm":
            svm.check_counts(targets, settings.folds, f"config.SVM.cross_val_folds={settings.folds}")
        else:
            svm.low_shot_targets(targets, max(shots.k_values), 0, settings.seed)


def _training_labels(data: Any) -> Iterator[np.ndarray]:
    """Yield the labels in the .npy files or class folders of the section DATA.TRAIN."""
    for path in map(str, data.LABEL_PATHS):
        if not Path(path).is_file():
            raise UserError(f"config.DATA.TRAIN.LABEL_PATHS: there is no file {path}")
        yield load_file(path)
    if not data.LABEL_PATHS and "disk_folder" in data.LABEL_SOURCES:
        for path in filter(os.path.isdir, map(str, data.DATA_PATHS)):
            yield np.array(ImageFolder(path).targets)


def _columns(targets: np.ndarray, wanted: list[int], classes: int | None = None) -> np.ndarray:
    """Return one column for each wanted class, of all classes if none is named."""
    columns = svm.class_targets(targets, classes)
    if wanted and max(wanted) >= columns.shape[1]:
        raise UserError(f"config.SVM.cls_list must name classes below {columns.shape[1]}, got {max(wanted)}")
    return columns[:, wanted] if wanted else columns


class _Engine(LayerEngine):
    """Fit and test the classifiers of each layer."""

    def evaluate(self, cfg: Any, folder: Path, layer: str) -> tuple[dict[str, Any], list[str]]:
        """Return the results of a layer, and the lines that describe them."""
        arrays = []
        for split in ("train", "test"):
            found = ExtractedFeaturesLoader.load_features(str(folder), split, layer, flatten_features=True)
            features, targets = found["features"], found["targets"]
            arrays.append((svm.unit_rows(features) if cfg.SVM.normalize else features, targets))
        (train, labels), (test, truth) = arrays
        wanted, classes = list(cfg.SVM.cls_list), None
        if labels.shape[1] == 1:
            classes = int(max(labels.max(), truth.max())) + 1
        bar = partial(tqdm, desc=f"{self.name} of {layer}", disable=None, leave=False)
        data = (train, _columns(labels, wanted, classes), test, _columns(truth, wanted, classes))
        return self.classify(data, svm_settings(cfg), cfg.SVM, bar)

    def classify(self, data: Any, settings: svm.Settings, section: Any, bar: Any) -> tuple[dict[str, Any], list[str]]:
        """Return the results of the classifiers of a layer, and the lines that describe them."""
        raise NotImplementedError


@register_engine("svm")
class SVMEngine(_Engine):
    """Classify with the training images of each class; the costs are chosen by cross-validation."""

    name = title = "svm"

    def classify(self, data: Any, settings: svm.Settings, section: Any, bar: Any) -> tuple[dict[str, Any], list[str]]:
        """Return mAP, average precision and chosen cost of each class."""
        found = svm.evaluate(*data, settings, bar=bar)
        numbers = list(section.cls_list) or list(range(len(found.costs)))
        content = {
            "mAP": 100 * found.mean,
            "classes": numbers,
            "AP": [None if np.isnan(value) else 100 * value for value in found.precisions],
            "cost": found.costs,
            "stopped at max_iter": found.stopped,
        }
        known = sum(value is not None for value in content["AP"])
        of = (
            f"{known} classes"
            if known == len(numbers)
            else f"{known} of {len(numbers)} classes, which have test images"
        )
        return content, [f"mAP {content['mAP']:.2f} % ({of})"]


@register_engine("svm_low_shot")
class LowShotEngine(_Engine):
    """Classify with k training images of each class, in independent samples."""

    name = title = "svm_low_shot"

    def classify(self, data: Any, settings: svm.Settings, section: Any, bar: Any) -> tuple[dict[str, Any], list[str]]:
        """Return mean, least, largest and standard deviation of the mAP of each k."""
        counts, samples = list(section.low_shot.k_values), list(section.low_shot.sample_inds)
        values = svm.low_shot(*data, settings, counts, samples, bar=bar)
        rows = {f"k={k}": svm.summarise(table, settings.costs) for k, table in zip(counts, values, strict=True)}
        shown = "mAP {mean:.2f} % (min {min:.2f}, max {max:.2f}, std {std:.2f}; cost {cost:g})"
        return rows, [f"{k}  {shown.format(**row)}" for k, row in rows.items()]
