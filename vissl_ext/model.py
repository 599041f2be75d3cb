"""VISSL's model with a head for each group of resolutions or for each feature, and the fork's heads."""

from typing import Any

import torch
from torch import Tensor, nn
from vissl.models import MODEL_REGISTRY
from vissl.models.base_ssl_model import BaseSSLMultiInputOutputModel
from vissl.models.heads import MODEL_HEADS_REGISTRY, register_model_head
from vissl.models.heads.mlp import MLP
from vissl.models.model_helpers import is_feature_extractor_model

from plugins.heads import projection_init_
from plugins.tools.command import UserError
from vissl_ext.heads import rows

WHOLE = [[0, None]]
"""MULTI_RES_SPLIT_CROPS where it is absent: one group of all resolutions, as VISSL has it."""


def check_groups(model_config: Any) -> None:
    """Validate MULTI_RES_SPLIT_CROPS.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: it is no list of [first resolution, end].
    """
    groups = model_config.get("MULTI_RES_SPLIT_CROPS", WHOLE)
    pairs = isinstance(groups, list) and groups and all(isinstance(group, list) and len(group) == 2 for group in groups)
    ends = [end for group in groups for end in group] if pairs else ["none"]
    if any(end is not None and (type(end) is not int or end < 0) for end in ends):
        raise UserError(
            "config.MODEL.MULTI_RES_SPLIT_CROPS has for each head its first resolution and the end, [[0,1],[0,null]], "
            f"got {groups}"
        )


class GroupedModel(BaseSSLMultiInputOutputModel):
    """VISSL's model; ``MULTI_RES_SPLIT_CROPS`` and ``OUT_FEATURE_KEYS`` give its heads different features.

    Args:
        model_config: VISSL's MODEL section.
        optimizer_config: VISSL's OPTIMIZER section.
    """

    def __init__(self, model_config: Any, optimizer_config: Any) -> None:
        super().__init__(model_config, optimizer_config)
        self.groups = model_config.get("MULTI_RES_SPLIT_CROPS", WHOLE)
        names = model_config.TRUNK.get("OUT_FEATURE_KEYS")
        if names and not is_feature_extractor_model(model_config):
            self._output_feature_names = list(names)

    def multi_res_input_forward(self, batch: list[Tensor], feature_names: list[str]) -> list[Tensor]:
        """Heads on groups of resolutions: the trunk sees each resolution once, head i the i-th group.

        Args:
            batch: crops; those of one resolution stand together.
            feature_names: what the trunk is asked for. Where it gives several features, head i has the i-th.
        """
        if self.groups == WHOLE:
            return super().multi_res_input_forward(batch, feature_names)
        single = self.model_config.SINGLE_PASS_EVERY_CROP
        resolutions = []
        for crops in by_resolution(batch):
            passes = [[crop] for crop in crops] if single else [crops]
            features = [self.trunk(torch.cat(images), feature_names) for images in passes]
            resolutions.append([torch.cat(parts) for parts in zip(*features, strict=True)])
        grouped = [
            torch.cat([features[min(head, len(features) - 1)] for features in resolutions[start:end]])
            for head, (start, end) in enumerate(self.groups)
        ]
        return self.heads_forward(grouped, self.heads)


def by_resolution(batch: list[Tensor]) -> list[list[Tensor]]:
    """Crops in lists of consecutive ones of one width."""
    found: list[list[Tensor]] = []
    for crop in batch:
        if found and found[-1][0].shape[-1] == crop.shape[-1]:
            found[-1].append(crop)
        else:
            found.append([crop])
    return found


class OptionMLP(MLP):
    """VISSL's head ``mlp`` with the fork's options; without them it is VISSL's.

    Args:
        model_config: VISSL's MODEL section.
        dims: widths of the layers, the input's first.
        use_bn: a batch norm after each layer.
        use_relu: a ReLU after each.
        use_dropout: dropout after each.
        use_bias: the layers have biases.
        skip_last_layer_relu_bn: none of these after the last layer.
        use_ln: a LayerNorm after each layer, computed in float32.
        use_gelu: a GELU after each, instead of a ReLU.
        is_JL_init: layers that narrow begin as random projections, N(0, 1 / out).
        is_residual: the input is added to the output; both have one width.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        model_config: Any,
        dims: list[int],
        use_bn: bool = False,
        use_relu: bool = False,
        use_dropout: bool = False,
        use_bias: bool = True,
        skip_last_layer_relu_bn: bool = True,
        use_ln: bool = False,
        use_gelu: bool = False,
        is_JL_init: bool = False,
        is_residual: bool = False,
    ) -> None:
        if use_gelu and use_relu:
            raise ValueError("use_gelu and use_relu exclude each other")
        if is_residual and dims[0] != dims[-1]:
            raise ValueError(f"is_residual needs a last width equal to the first, got {dims[0]} and {dims[-1]}")
        super().__init__(model_config, dims, use_bn, use_relu, use_dropout, use_bias, skip_last_layer_relu_bn)
        self.is_residual = is_residual
        if is_JL_init:
            projection_init_(self.clf)
        if not (use_ln or use_gelu):
            return
        blocks: list[list[nn.Module]] = []
        for layer in self.clf:
            if isinstance(layer, nn.Linear):
                blocks.append([layer])
            else:
                blocks[-1].append(layer)
        for width, block in zip(dims[1:], blocks, strict=True):
            if block is blocks[-1] and skip_last_layer_relu_bn:
                break
            if use_gelu:
                block.insert(len(block) - use_dropout, nn.GELU())
            if use_ln:
                block.insert(1 + use_bn, nn.LayerNorm(width, eps=1e-6))
        self.clf = nn.Sequential(*(layer for block in blocks for layer in block))

    def forward(self, batch: Tensor) -> Tensor:
        """``[B, dims[0]]`` (or with trailing axes of one) → ``[B, dims[-1]]``."""
        out = super().forward(batch)
        return out + rows(batch) if self.is_residual else out


@register_model_head("identity")
class IdentityHead(nn.Identity):
    """The features as they are."""


@register_model_head("batchnorm")
class BatchNormHead(nn.Module):
    """A batch norm alone.

    Args:
        model_config: VISSL's MODEL section.
        dim: width of the features.
    """

    def __init__(self, model_config: Any, dim: int) -> None:
        super().__init__()
        head = model_config.HEAD
        self.norm = nn.BatchNorm1d(dim, eps=head.BATCHNORM_EPS, momentum=head.BATCHNORM_MOMENTUM)

    def forward(self, batch: Tensor) -> Tensor:
        """``[B, dim]`` (or with trailing axes of one) → ``[B, dim]``."""
        return self.norm(rows(batch))


def replace_model() -> None:
    """Let VISSL build these where a configuration names its own."""
    MODEL_REGISTRY["multi_input_output_model"] = GroupedModel
    MODEL_HEADS_REGISTRY["mlp"] = OptionMLP
