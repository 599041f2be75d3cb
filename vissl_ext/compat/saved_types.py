"""What files of former VISSL hold besides tensors, read as torch reads files from outside: with ``weights_only``.

classy_vision/generic/util.py:280 reads checkpoints and the weights of MODEL.WEIGHTS_INIT.PARAMS_FILE, and
classy_vision/generic/distributed_util.py:283 hands them to the other processes; since torch 2.6 both refuse NumPy's
numbers and arrays, VISSL's AttrDict and the argparse.Namespace of other people's releases. vissl/utils/
cluster_utils.py:45 reads the AttrDict that it has written itself. The types below hold values and run no code; all
others stay refused.
"""

from argparse import Namespace
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from numpy import dtypes


class _Mapping:
    """Stands in for AttrDict: torch's reader fills this kind of mapping only."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


_NUMBERS = (
    "Bool",
    *(f"{kind}{bits}" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    "Float16",
    "Float32",
    "Float64",
)
_SCALAR = np.float64(0).__reduce__()[0]
_ARRAY = np.zeros(0).__reduce__()[0]


def activate() -> None:
    """Let torch.load read them."""
    named = [(_SCALAR, "scalar"), (_ARRAY, "_reconstruct")]
    torch.serialization.add_safe_globals(
        [
            # NumPy 2 has moved them; files name the former place, or the present one
            *((function, f"numpy.{core}.multiarray.{name}") for function, name in named for core in ("core", "_core")),
            *(getattr(dtypes, f"{name}DType") for name in _NUMBERS),
            *(np.dtype, np.ndarray, Namespace),
            # its former place, and the present one
            *((_Mapping, f"vissl.{module}.AttrDict") for module in ("utils.hydra_config", "config.attr_dict")),
        ]
    )
    _read_clusters_as_written()


def _read_clusters_as_written() -> None:
    from vissl.config import AttrDict
    from vissl.utils.cluster_utils import ClusterAssignmentLoader

    stock = ClusterAssignmentLoader.load_cluster_assigment
    if hasattr(stock, "mends"):
        return

    def load_cluster_assigment(file_path: str) -> Any:
        """The assignment of a file, its configuration an AttrDict again."""
        assignment = stock(file_path)
        assignment.config = AttrDict(assignment.config)
        return assignment

    load_cluster_assigment.mends = stock
    ClusterAssignmentLoader.load_cluster_assigment = staticmethod(load_cluster_assigment)


def unknown_types(path: str) -> list[str]:
    """What a file names that torch.load refuses to read.

    Args:
        path: of a file of torch.save.

    Returns:
        Sorted names; empty where all is known, or the file is of torch's format of before 1.6, which cannot be asked.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        return []
