"""VISSL's readers of .npy, .pkl and .yaml files, without code.

vissl/utils/io.py:105 unpickles whatever a .pkl file holds, and vissl/data/ssl_dataset.py:176 lets a .npy file of labels
hold pickles: both run the code of a malicious file. Lists of images (vissl/data/disk_dataset.py:81), permutations of
patches (vissl/data/ssl_transforms/shuffle_img_patches.py:49), features and labels are read by them.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml

from plugins.tools.command import UserError

_NAMED = {
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("collections", "OrderedDict"),
    *(("builtins", name) for name in ("set", "frozenset", "complex")),
    *(("__builtin__", name) for name in ("set", "frozenset", "complex")),
    ("_codecs", "encode"),  # bytes, as Python 2's protocol writes them
}
"""What a pickle of plain values and NumPy's arrays names."""


class _Reader(pickle.Unpickler):
    """Reads plain values and NumPy's arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Find what a pickle names.

        Raises:
            UnpicklingError: it is none of the names that hold values.
        """
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code")
        return super().find_class(module, name)


def load_file(filename: str, mmap_mode: str | None = None) -> Any:
    """Read a .npy, .pkl, .pickle, .json or .yaml file; no code in it runs.

    Args:
        filename: the path.
        mmap_mode: of ``numpy.load``, for .npy files.

    Raises:
        UserError: it cannot be read, or holds more than plain values and arrays.
    """
    from iopath.common.file_io import g_pathmgr

    kind = Path(filename).suffix
    try:
        if kind == ".npy":
            return _load_npy(filename, mmap_mode)
        with g_pathmgr.open(filename, "rb") as file:
            if kind in (".pkl", ".pickle"):
                return _load_pickle(file)
            if kind == ".json":
                return json.load(file)
            if kind == ".yaml":
                return yaml.safe_load(file)
    except UserError:
        raise
    except Exception as error:  # a broken pickle makes Python raise nearly anything
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        raise UserError(f"{filename} cannot be read as a {kind} file of plain values: {reason}") from None
    raise UserError(f"{filename} cannot be read: its name must end in .npy, .pkl, .pickle, .json or .yaml")


def _load_pickle(file: BinaryIO) -> Any:
    return _Reader(file, encoding="latin1").load()


def _load_npy(filename: str, mmap_mode: Any) -> Any:
    from iopath.common.file_io import g_pathmgr

    path = g_pathmgr.get_local_path(filename)
    array = np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of arrays")
    return array


def _load_labels(self: Any, path: str) -> Any:
    """The labels of a .npy file, in place of ``GenericSSLDataset.load_single_label_file``."""
    if Path(path).suffix != ".npy":
        raise UserError(f"{path} is no .npy file of labels")
    return load_file(path, "r" if self.cfg["DATA"][self.split].MMAP_MODE else None)


def activate() -> None:
    """Let VISSL use these readers, also in modules that have imported its own already."""
    from vissl.data import ssl_dataset
    from vissl.utils import io

    stock = io.load_file
    for module in [*sys.modules.values()]:
        name = getattr(module, "__name__", "")
        if name.startswith("vissl.") and getattr(module, "load_file", None) is stock:
            module.load_file = load_file
    ssl_dataset.GenericSSLDataset.load_single_label_file = _load_labels
