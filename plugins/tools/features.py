"""Read and write precomputed features: .npy files, and folders in the format of VISSL's ``extract_features``.

Such a folder contains ``rank{R}_chunk{C}_{train|test}_{layer}_{features,targets,inds}.npy``.
"""

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plugins.tools.command import UserError
from plugins.tools.files import atomic


def usable_device(name: str | None) -> torch.device:
    """Return the device with a name; None means the GPU if one is available, else the CPU.

    Raises:
        UserError: the device cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_arrays(features: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Load features and classes from two files.

    Args:
        features: a .npy file of floating-point numbers, ``[N, ...]``.
        labels: a .npy file of integers of at least 0, ``[N]`` or ``[N, 1]``.

    Returns:
        Features ``[N, D]`` in single precision and classes ``[N]``.

    Raises:
        UserError: a file is missing, or its shape or type is wrong.
    """
    return _checked(_load(features), _load(labels), str(features), str(labels))


def load_features(folder: Path, split: str, layer: str | None = None) -> tuple[Tensor, Tensor]:
    """Load the features of a folder, one row per image, in the order of the image indices.

    Args:
        folder: a folder that VISSL's ``extract_features`` or :func:`save_features` wrote.
        split: "train" or "test".
        layer: name of the layer; None is allowed if the folder has features of one layer only.

    Returns:
        Features ``[N, D]`` in single precision and classes ``[N]``.

    Raises:
        UserError: the folder has no such features, ``layer`` is None for several layers, a file is missing, or its
            shape or type is wrong.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    pattern = re.compile(rf"(rank\d+_chunk\d+_{split}_(.+))_inds\.npy")
    stems: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()):
        if match := pattern.fullmatch(path.name):
            stems.setdefault(match[2], []).append(match[1])
    if layer is None and len(stems) > 1:
        raise UserError(f"{folder} holds features of several layers: choose one with --layer, of {', '.join(stems)}")
    if not stems or (layer is not None and layer not in stems):
        of = f" of {layer}" if layer else ""
        known = f", only of {', '.join(stems)}" if stems else ""
        raise UserError(f"{folder} contains no features{of} of the {split} images{known}")
    chosen = stems[layer or next(iter(stems))]

    def arrays(kind: str) -> np.ndarray:
        parts = [_load(folder / f"{stem}_{kind}.npy") for stem in chosen]
        try:
            return np.concatenate(parts)
        except ValueError as error:
            raise UserError(f"the {kind} of the {split} images in {folder} do not fit one another: {error}") from None

    indices, features, labels = (arrays(kind) for kind in ("inds", "features", "targets"))
    if not len(indices) == len(features) == len(labels):
        counts = f"{len(indices)} indices, {len(features)} features, {len(labels)} targets"
        raise UserError(f"{folder} holds unequal numbers of the {split} images: {counts}")
    # the distributed sampler repeats images, so that all ranks have the same number
    _, first = np.unique(indices, return_index=True)
    what = f"the {split} images in {folder}"
    return _checked(features[first], labels[first], f"the features of {what}", f"the targets of {what}")


def save_features(folder: Path, split: str, layer: str, features: Tensor, labels: Tensor) -> None:
    """Write features in the format that :func:`load_features` and VISSL read."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"features": features, "targets": labels.reshape(-1, 1), "inds": torch.arange(len(labels))}
    for kind, array in content.items():
        with atomic(folder / f"rank0_chunk0_{split}_{layer}_{kind}.npy") as file:
            np.save(file, array.cpu().numpy())


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:  # a corrupt header may give a very large shape
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a readable .npy file: {reason}") from None
    if not isinstance(array, np.ndarray) or not array.ndim:
        raise UserError(f"{path} holds no array of rows")
    return array


def _checked(features: np.ndarray, labels: np.ndarray, what: str, of_labels: str) -> tuple[Tensor, Tensor]:
    if features.ndim < 2 or not features.size or not np.issubdtype(features.dtype, np.floating):
        raise UserError(f"{what} must be floating-point numbers [N, D], got {features.dtype} {list(features.shape)}")
    if labels.shape not in ((len(features),), (len(features), 1)) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{of_labels} must be {len(features)} integers, one for each row of features, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if (least := int(labels.min())) < 0:
        raise UserError(f"{of_labels} must be classes of at least 0, got {least}")
    rows = torch.from_numpy(features.reshape(len(features), -1).astype(np.float32, copy=False))
    if not rows.isfinite().all():
        raise UserError(f"{what} hold numbers that are not finite")
    return rows, torch.from_numpy(labels.reshape(-1).astype(np.int64))
