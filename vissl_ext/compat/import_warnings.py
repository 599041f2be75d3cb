"""Warnings due to VISSL's code, which a user cannot avoid.

classy_vision/dataset/transforms/__init__.py:15 (torchvision's video transforms), classy_vision/models/mlp.py and others
(torch.jit), vissl/utils/hydra_config.py:124 (Hydra's version_base), vissl/trainer/train_task.py:203 and
vissl/trainer/train_steps/standard_train_step.py:132 (torch.cuda.amp), vissl/utils/collect_env.py:55 (no CUDA toolkit).
"""

import logging
import warnings

_MESSAGES = (
    ".*_functional_video.* module is deprecated",
    ".*_transforms_video.* module is deprecated",
    ".*torch.jit.script.* is deprecated",
    r"\s*The version_base parameter is not specified",
    r"`torch.cuda.amp.(autocast|GradScaler)\(args\.\.\.\)` is deprecated",
)


def activate() -> None:
    """Filter these warnings."""
    for message in _MESSAGES:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
