"""Readers of .npy, .pkl and .yaml files that run no code of the file.

vissl/utils/io.py:105 unpickles any content of a .pkl file, and vissl/data/ssl_dataset.py:176 allows pickles in .npy
files of labels: both run the code in a malicious file. VISSL reads lists of images (vissl/data/disk_dataset.py:81),
permutations of patches (vissl/data/ssl_transforms/shuffle_img_patches.py:49), features and labels with them.
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
"""Module and name of the classes and functions in a pickle of plain values and NumPy arrays."""


class _Reader(pickle.Unpickler):
    """Unpickler of plain values and NumPy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of the pickle.

        Raises:
            UnpicklingError: it is not allowed.
        """
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, which could run code")
        return super().find_class(module, name)


def load_file(filename: str, mmap_mode: str | None = None) -> Any:
    """Read a .npy, .pkl, .pickle, .json or .yaml file without running code of the file.

    Args:
        filename: path of the file.
        mmap_mode: argument of ``numpy.load`` for .npy files.

    Raises:
        UserError: the file cannot be read, or contains other objects than plain values and arrays.
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
    except Exception as error:  # an invalid pickle may raise an exception of almost any class
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
    """Read a .npy file of labels, in place of ``GenericSSLDataset.load_single_label_file``."""
    if Path(path).suffix != ".npy":
        raise UserError(f"the labels must be a .npy file, got {path}")
    return load_file(path, "r" if self.cfg["DATA"][self.split].MMAP_MODE else None)


def activate() -> None:
    """Replace VISSL's readers, also in modules that have already imported them."""
    from vissl.data import ssl_dataset
    from vissl.utils import io

    stock = io.load_file
    for module in [*sys.modules.values()]:
        name = getattr(module, "__name__", "")
        if name.startswith("vissl.") and getattr(module, "load_file", None) is stock:
            module.load_file = load_file
    ssl_dataset.GenericSSLDataset.load_single_label_file = _load_labels
