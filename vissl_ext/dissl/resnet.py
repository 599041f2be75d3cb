"""VISSL's trunk ``resnet`` with the fork's settings; without them it is VISSL's.

Of RESNETS: ``Z_DIM_OLD_TMP_NEW`` (a block between the last stage and the pooling that widens the features),
``AVG_POOL_KERNEL_SIZE`` (-1: VISSL's pooling, null: none, a number: an average of that size, stride 1) and
``IS_SKIP_RESIZER`` (the first head has the pooled features of before the block). Of MODEL: the ``INPUT_TYPE`` rgba.
"""

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from vissl.models.trunks import MODEL_TRUNKS_REGISTRY
from vissl.models.trunks.resnext import ResNeXt

from plugins.heads import ExpandDim


class WideResNeXt(ResNeXt):
    """See the module.

    Args:
        model_config: VISSL's MODEL section.
        model_name: the trunk's name; not used.
    """

    def __init__(self, model_config: Any, model_name: str) -> None:
        four = model_config.INPUT_TYPE == "rgba"
        stock = model_config
        if four:
            stock = deepcopy(model_config)
            stock.INPUT_TYPE = "rgb"
        super().__init__(stock, model_name)
        self.model_config = model_config
        config = model_config.TRUNK.RESNETS
        blocks = dict(self._feature_blocks.items())
        if four:
            conv = blocks["conv1"]
            blocks["conv1"] = nn.Conv2d(4, conv.out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        size = config.get("AVG_POOL_KERNEL_SIZE", -1)
        if size != -1:
            blocks["avgpool"] = nn.Identity() if size is None else nn.AvgPool2d(size, 1)
        self.skips = config.get("IS_SKIP_RESIZER", False)
        if config.get("Z_DIM_OLD_TMP_NEW"):
            last = {name: blocks.pop(name) for name in ("avgpool", "flatten")}
            blocks = {**blocks, "resizer": ExpandDim(*config.Z_DIM_OLD_TMP_NEW), **last}
            self.feat_eval_mapping = {**self.feat_eval_mapping, "resizer": "resizer"}
        self._feature_blocks = nn.ModuleDict(blocks)

    def forward(self, x: Tensor, out_feat_keys: list[str] | None = None) -> list[Tensor]:
        """Images → the features that are asked for by name; with IS_SKIP_RESIZER the narrow and the wide ones."""
        if not self.skips:
            return super().forward(x, out_feat_keys)
        narrow, wide = super().forward(x, ["res5", "flatten"])
        blocks = self._feature_blocks
        return [blocks["flatten"](blocks["avgpool"](narrow)), wide]


def replace_resnet() -> None:
    """Let VISSL build this where a configuration says ``resnet``."""
    MODEL_TRUNKS_REGISTRY["resnet"] = WideResNeXt
