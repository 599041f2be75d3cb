"""Types in VISSL's files that torch must be allowed to load with ``weights_only``.

classy_vision/generic/util.py:280 reads checkpoints and the weights of MODEL.WEIGHTS_INIT.PARAMS_FILE, and
classy_vision/generic/distributed_util.py:283 broadcasts them. Since torch 2.6 both reject NumPy scalars and arrays,
VISSL's AttrDict, and the argparse.Namespace of some released weights. vissl/utils/cluster_utils.py:45 reads an AttrDict
that VISSL has written. The types below contain values and run no code; all others remain rejected.
"""

from argparse import Namespace
from collections import OrderedDict
from functools import wraps
from typing import Any

import numpy as np
import torch
from numpy import dtypes


class _Mapping:
    """Replacement of AttrDict by OrderedDict, the only mapping that torch's unpickler can fill."""

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
    """Allow torch.load to load these types."""
    named = [(_SCALAR, "scalar"), (_ARRAY, "_reconstruct")]
    torch.serialization.add_safe_globals(
        [
            # NumPy 2 has moved them; a file has the former module name or the present one
            *((function, f"numpy.{core}.multiarray.{name}") for function, name in named for core in ("core", "_core")),
            *(getattr(dtypes, f"{name}DType") for name in _NUMBERS),
            *(np.dtype, np.ndarray, Namespace),
            # the former module name and the present one
            *((_Mapping, f"vissl.{module}.AttrDict") for module in ("utils.hydra_config", "config.attr_dict")),
        ]
    )
    _restore_cluster_config()


def _restore_cluster_config() -> None:
    from vissl.config import AttrDict
    from vissl.utils.cluster_utils import ClusterAssignmentLoader

    stock = ClusterAssignmentLoader.load_cluster_assigment
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def load_cluster_assigment(file_path: str) -> Any:
        """Load an assignment, and convert its configuration to an AttrDict."""
        assignment = stock(file_path)
        assignment.config = AttrDict(assignment.config)
        return assignment

    ClusterAssignmentLoader.load_cluster_assigment = staticmethod(load_cluster_assigment)


def unknown_types(path: str) -> list[str]:
    """Return the names of the types in a file that torch.load rejects.

    Args:
        path: path of a file of torch.save.

    Returns:
        Sorted names; empty if there are none, or if the file has torch's format before 1.6, which cannot be examined.
    """
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except ValueError:
        return []
