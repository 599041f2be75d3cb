"""``np.float``, ``np.int``, ``np.bool`` and ``np.in1d``, names that NumPy has removed.

float: vissl/meters/mean_ap_meter.py:70, vissl/utils/svm_utils/evaluate.py:43.
int: vissl/utils/instance_retrieval_utils/rmac.py:102, classy_vision/dataset/transforms/autoaugment.py:170.
bool, missing from 1.24 to 2.0: vissl/data/collators/cutmixup_collator.py:372.
in1d: vissl/utils/instance_retrieval_utils/evaluate.py:133.
"""

import numpy as np

_NAMES = {"float": float, "int": int, "bool": bool, "in1d": np.isin}


def activate() -> None:
    """Add the missing names."""
    for name, meaning in _NAMES.items():
        if name not in np.__dict__ and name not in dir(np):
            setattr(np, name, meaning)
