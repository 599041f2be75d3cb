"""VISSL's model with separate features for each head, and the heads of DISSL's fork of VISSL."""

from typing import Any

import torch
from torch import Tensor, nn
from vissl.models import MODEL_REGISTRY
from vissl.models.base_ssl_model import BaseSSLMultiInputOutputModel
from vissl.models.heads import MODEL_HEADS_REGISTRY, register_model_head
from vissl.models.heads.mlp import MLP
from vissl.models.model_helpers import is_feature_extractor_model

from plugins.heads import projection_init_
from plugins.norms import per_sample_norm_
from plugins.objective import connect, encode
from plugins.patches import see_patches_
from plugins.taps import FeatureTaps
from plugins.tools.command import UserError
from vissl_ext.heads import rows
from vissl_ext.methods import MethodHead

WHOLE = [[0, None]]
"""Default of MULTI_RES_SPLIT_CROPS: each head receives all resolutions, as in VISSL."""


def check_groups(model_config: Any) -> None:
    """Validate MULTI_RES_SPLIT_CROPS.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: it is not a list of pairs [first resolution, end].
    """
    groups = model_config.get("MULTI_RES_SPLIT_CROPS", WHOLE)
    pairs = isinstance(groups, list) and groups and all(isinstance(group, list) and len(group) == 2 for group in groups)
    ends = [end for group in groups for end in group] if pairs else ["none"]
    if any(end is not None and (type(end) is not int or end < 0) for end in ends):
        raise UserError(
            "config.MODEL.MULTI_RES_SPLIT_CROPS must be a list with a pair [first resolution, end] for each head, such "
            f"as [[0,1],[0,null]], got {groups}"
        )


def check_adaptation(model_config: Any) -> None:
    """Validate PATCHES and PER_SAMPLE_NORM of the section TRUNK.

    Args:
        model_config: VISSL's MODEL section.

    Raises:
        UserError: PATCHES are not two positive integers, or PER_SAMPLE_NORM is not true or false.
    """
    patches, per_sample = (model_config.TRUNK.get(key) for key in ("PATCHES", "PER_SAMPLE_NORM"))
    if patches is not None and (len(patches) != 2 or any(type(value) is not int or value < 1 for value in patches)):
        raise UserError(
            "config.MODEL.TRUNK.PATCHES must be [side of a patch, distance of neighbouring patches] in pixels, got "
            f"{list(patches)}"
        )
    if not isinstance(per_sample, bool | None):
        raise UserError(f"config.MODEL.TRUNK.PER_SAMPLE_NORM must be true or false, got {per_sample!r}")


def adapt_trunk(model_config: Any, trunk: nn.Module) -> None:
    """Let a trunk see what a method of patches has trained it on, for evaluation.

    Args:
        model_config: VISSL's MODEL section. ``TRUNK.PER_SAMPLE_NORM`` is true for a trunk that was trained with
            ``norm: per_sample``. With ``TRUNK.PATCHES: [side, distance]`` the features of an image are the mean over
            its patches.
        trunk: of this configuration, changed in place.
    """
    if model_config.TRUNK.get("PER_SAMPLE_NORM"):
        per_sample_norm_(trunk)
    if model_config.TRUNK.get("PATCHES") is not None:
        see_patches_(trunk, *model_config.TRUNK.PATCHES)


class GroupedModel(BaseSSLMultiInputOutputModel):
    """VISSL's model, in which ``MULTI_RES_SPLIT_CROPS`` and ``OUT_FEATURE_KEYS`` select the features of each head.

    Args:
        model_config: VISSL's MODEL section.
        optimizer_config: VISSL's OPTIMIZER section.
    """

    def __init__(self, model_config: Any, optimizer_config: Any) -> None:
        super().__init__(model_config, optimizer_config)
        self.groups = model_config.get("MULTI_RES_SPLIT_CROPS", WHOLE)
        adapt_trunk(model_config, self.trunk)
        names = model_config.TRUNK.get("OUT_FEATURE_KEYS")
        if names and not is_feature_extractor_model(model_config):
            self._output_feature_names = list(names)
        for head in self.heads:
            if isinstance(head, MethodHead):
                try:
                    head.prepare(self.trunk)
                    connect(head.projector, _OfImages(self.trunk), head.taps)
                except ValueError as error:
                    raise UserError(f"config.MODEL.TRUNK: {error}") from None

    def forward(self, batch: Any) -> Any:
        """Compute the outputs of the heads. Training of a method with ``taps`` appends the maps of each view.

        Args:
            batch: images ``[N, 3, H, W]``, or a list of crops as for ``multi_res_input_forward``.
        """
        head = self.heads[0] if len(self.heads) == 1 else None
        if not (self.training and isinstance(head, MethodHead) and head.taps):
            return super().forward(batch)
        with FeatureTaps(self.trunk, head.taps) as taps:
            (output,) = super().forward(batch)
            views = batch if isinstance(batch, list) else batch.chunk(head.views)
            maps = taps.take([view.shape[:-3] for view in views])
        return [[*output, *(local for view in maps for local in head.projector.project_maps(view))]]

    def multi_res_input_forward(self, batch: list[Tensor], feature_names: list[str]) -> list[Tensor]:
        """Compute the features of each resolution once, and apply head i to the i-th group of resolutions.

        Args:
            batch: crops; those of the same resolution are consecutive. Stacks of patches, ``[B, P, 3, h, w]``, are
                last.
            feature_names: features that the trunk returns. If it returns several, head i receives the i-th.

        Returns:
            The outputs of the heads.
        """
        stacks = [view for view in batch if view.ndim == 5]
        if stacks:
            return self._with_stacks(batch[: len(batch) - len(stacks)], stacks, feature_names)
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

    def _with_stacks(self, views: list[Tensor], stacks: list[Tensor], feature_names: list[str]) -> list[Tensor]:
        """Apply the head to the features of the views, and of the stacks of patches that follow them."""
        single = self.model_config.SINGLE_PASS_EVERY_CROP
        passes = [[crop] for crop in views] if single else by_resolution(views)
        features = [self.features(torch.cat(crops), feature_names) for crops in passes]
        (head,) = self.heads
        of_views = [torch.cat(features)] if views else []
        return [head([*of_views, *(self.features(stack, feature_names) for stack in stacks)])]

    def features(self, view: Tensor, feature_names: list[str] | None = None) -> Tensor:
        """Compute the features of a view ``[B, 3, H, W]``, or of a stack of patches ``[B, P, 3, h, w]``.

        Args:
            view: the images.
            feature_names: features that the trunk returns, of which the first is taken; None for those that the
                configuration names.

        Returns:
            ``[B, F]``, or ``[B, P, F]`` for a stack.
        """
        names = self._output_feature_names if feature_names is None else feature_names
        return encode(lambda images: self.trunk(images, names)[0], view)


class _OfImages(nn.Module):
    """A trunk that is called with images alone, which some of VISSL's own do not allow."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: Tensor) -> Any:
        return self.trunk(images, [])


def by_resolution(batch: list[Tensor]) -> list[list[Tensor]]:
    """Split crops into lists of consecutive crops of the same width."""
    found: list[list[Tensor]] = []
    for crop in batch:
        if found and found[-1][0].shape[-1] == crop.shape[-1]:
            found[-1].append(crop)
        else:
            found.append([crop])
    return found


class OptionMLP(MLP):
    """VISSL's head ``mlp`` with the additional options of DISSL's fork, the last four. By default it is VISSL's head.

    Args:
        model_config: VISSL's MODEL section.
        dims: widths of the input and of each layer.
        use_bn: add a batch norm after each layer.
        use_relu: add a ReLU after each layer.
        use_dropout: add dropout after each layer.
        use_bias: whether the layers have biases.
        skip_last_layer_relu_bn: add nothing after the last layer.
        use_ln: add a LayerNorm after each layer.
        use_gelu: add a GELU after each layer; excludes ``use_relu``.
        is_JL_init: initialise layers whose output is narrower than their input as random projections, N(0, 1 / out).
        is_residual: add the input to the output; requires equal widths.

    Raises:
        ValueError: two options exclude each other.
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
            raise ValueError("use_gelu and use_relu exclude each other: set one of them to false")
        if is_residual and dims[0] != dims[-1]:
            raise ValueError(f"is_residual requires equal first and last dims, got {dims[0]} and {dims[-1]}")
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
        """Map ``[B, dims[0]]``, trailing axes of size 1 allowed, to ``[B, dims[-1]]``."""
        out = super().forward(batch)
        return out + rows(batch) if self.is_residual else out


@register_model_head("identity")
class IdentityHead(nn.Identity):
    """A head that returns the features unchanged."""


@register_model_head("batchnorm")
class BatchNormHead(nn.Module):
    """A head that consists of a batch norm.

    Args:
        model_config: VISSL's MODEL section.
        dim: width of the features.
    """

    def __init__(self, model_config: Any, dim: int) -> None:
        super().__init__()
        head = model_config.HEAD
        self.norm = nn.BatchNorm1d(dim, eps=head.BATCHNORM_EPS, momentum=head.BATCHNORM_MOMENTUM)

    def forward(self, batch: Tensor) -> Tensor:
        """Normalise ``[B, dim]``, trailing axes of size 1 allowed."""
        return self.norm(rows(batch))


def replace_model() -> None:
    """Register GroupedModel and OptionMLP under the names of the VISSL classes that they extend."""
    MODEL_REGISTRY["multi_input_output_model"] = GroupedModel
    MODEL_HEADS_REGISTRY["mlp"] = OptionMLP
