"""Feature maps from inside a backbone, for heads that compare local features."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.modes import in_mode

_REFUSED = {
    "FullyShardedDataParallel": "FSDP",
    "FSDPModule": "FSDP",
    "CheckpointWrapper": "activation checkpointing",
    "OptimizedModule": "torch.compile",
}
"""Class → what wraps a module with it: parameters are sharded, the forward pass is repeated, hooks are left out."""


class FeatureTaps:
    """Keep the outputs of named modules of a backbone, ``[B, C, H, W]``, within a ``with`` block.

    The block encloses the forward passes of one batch. Its hooks exist in the block only, so that other passes, copies
    and pickles of the backbone keep nothing, and a module may be replaced between two blocks, for example by
    ``convert_sync_batchnorm``. The backbone is called as ever; its result does not change.

    Args:
        backbone: the module to tap. It may be part of a module that DistributedDataParallel wraps, or that is compiled;
            it cannot itself be compiled.
        sizes: name of a submodule → side of its map, > 0. A larger map is reduced by adaptive average pooling; None
            keeps the map as it is. The name is one of ``backbone.named_modules()``, or the last part of exactly one of
            them: "layer3" is also "_feature_blocks.layer3".

    Raises:
        ValueError: there is no submodule of a name, a size is out of range, or (also at the start of the block) the
            backbone is compiled, or wrapped in FSDP or activation checkpointing, with which maps would lack their
            gradients.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        >>> views = [torch.zeros(4, 3, 8, 8), torch.zeros(4, 3, 6, 6)]
        >>> with FeatureTaps(backbone, {"0": 2, "1": None}) as taps:
        ...     features = [backbone(view) for view in views]
        ...     maps = taps.take([view.shape[:-3] for view in views])
        >>> [[tuple(map.shape) for map in view] for view in maps]
        [[(4, 5, 2, 2), (4, 5, 8, 8)], [(4, 5, 2, 2), (4, 5, 6, 6)]]
    """

    def __init__(self, backbone: nn.Module, sizes: Mapping[str, int | None]) -> None:
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"the size of {name} must be an integer > 0 or None, got {size!r}")
        self.backbone, self.sizes = backbone, sizes
        self._kept: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in sizes}
        self._lost: set[str] = set()
        self._handles: list[Any] = []
        self._with_gradient = False
        self._found()

    def _found(self) -> list[nn.Module]:
        """Return the modules of the names."""
        if not self.sizes:
            return []
        modules = dict(self.backbone.named_modules())
        for module in modules.values():
            how = "torch.compile" if module._compiled_call_impl is not None else _refused(type(module))
            if how:
                raise ValueError(
                    f"{how} of the backbone or of a part of it allows no feature maps; train it with one device or "
                    "DistributedDataParallel, without activation checkpointing, and compile at most the whole model"
                )
        return [modules[_path(name, modules, self.backbone)] for name in self.sizes]

    def __enter__(self) -> "FeatureTaps":
        self._with_gradient = torch.is_grad_enabled()
        pairs = zip(self.sizes, self._found(), strict=True)
        self._handles = [module.register_forward_hook(partial(self._keep, name)) for name, module in pairs]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.forget()

    def forget(self) -> None:
        """Forget the maps since the last call of ``take``."""
        self._kept, self._lost = {name: [] for name in self.sizes}, set()

    def _keep(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        """Keep an output as it is: a checkpointed region may hold no more operations than without taps."""
        if not isinstance(output, Tensor) or output.ndim != 4:
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"the output of {name} is not a map [B, C, H, W], got {given}; tap another module")
        self._kept[name].append((output, 0 if output.is_inference() else output._version))
        # checkpointing of an image, which has no gradient, breaks the graph
        if self._with_gradient and not output.requires_grad and _is_trained(self.backbone, module):
            self._lost.add(name)

    def take(self, views: Sequence[Sequence[int]]) -> list[tuple[Tensor, ...]]:
        """Return the maps of each view since the last call, in the order of ``sizes``, and forget them.

        The backbone may have been called once per view, or on several consecutive views concatenated. The views may
        differ in size, and so may their maps.

        Args:
            views: leading axes of each view, in the order of the calls: (B,) of images ``[B, 3, H, W]``, and (B, P) of
                a stack of patches ``[B, P, 3, h, w]``.

        Returns:
            For each view a tuple with one map ``[B, C, H, W]`` per tapped module, ``[B, P, C, H, W]`` of a stack.

        Raises:
            ValueError: the calls do not make these views, a map has no gradient because of activation checkpointing,
                or a map has been changed in place.
        """
        try:
            if self._lost:
                raise ValueError(
                    f"the maps of {', '.join(sorted(self._lost))} have no gradient; switch off the activation "
                    "checkpointing of the backbone, or tap a module after those that are not trained"
                )
            of_modules = [self._split(name, kept, views) for name, kept in self._kept.items()]
            return [tuple(of_module[view] for of_module in of_modules) for view in range(len(views))]
        finally:
            self.forget()

    def _split(self, name: str, kept: list[tuple[Tensor, int]], views: Sequence[Sequence[int]]) -> list[Tensor]:
        rows = [prod(axes) for axes in views]
        found: list[Tensor] = []
        for map_, version in kept:
            if not map_.is_inference() and map_._version != version:
                raise ValueError(f"the map of {name} has been changed in place; tap the module that changes it")
            end = len(found) + 1
            while end < len(rows) and sum(rows[len(found) : end]) < len(map_):
                end += 1
            if sum(rows[len(found) : end]) != len(map_):
                break
            found += self._pooled(name, map_).split(rows[len(found) : end])
        if len(found) != len(rows) or sum(len(part) for part in found) != sum(len(map_) for map_, _ in kept):
            raise ValueError(
                f"the maps of {name} have {[len(map_) for map_, _ in kept]} rows, which are not those of views of "
                f"{rows} rows; call the backbone once on each view, or on consecutive views concatenated"
            )
        return [part.unflatten(0, tuple(axes)) for part, axes in zip(found, views, strict=True)]

    def _pooled(self, name: str, map_: Tensor) -> Tensor:
        size = self.sizes[name]
        if size is None or max(map_.shape[-2:]) <= size:
            return map_
        height, width = map_.shape[-2:]
        return F.adaptive_avg_pool2d(map_, (min(height, size), min(width, size)))


@torch.no_grad()
def map_channels(
    backbone: nn.Module, sizes: Mapping[str, int | None], sides: Sequence[int] = (64, 224, 128, 32)
) -> list[int]:
    """Count the channels of the maps, by a pass of a black image through the backbone in evaluation mode.

    Args:
        backbone: the module to tap; its state does not change.
        sizes: as of FeatureTaps.
        sides: of the image, in pixels. The first is used that the backbone can process.

    Returns:
        The number of channels of each map, in the order of ``sizes``.

    Raises:
        ValueError: as FeatureTaps, or the backbone cannot process the image.

    >>> map_channels(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), {"1": 2})
    [5]
    """
    if not sizes:
        return []
    example = next((p for p in backbone.parameters() if p.is_floating_point()), torch.zeros(()))
    with in_mode(False, backbone), FeatureTaps(backbone, sizes) as taps:
        ((*maps,),) = _first_maps(backbone, taps, sides, example)
    return [map_.shape[1] for map_ in maps]


def _first_maps(
    backbone: nn.Module, taps: FeatureTaps, sides: Sequence[int], example: Tensor
) -> list[tuple[Tensor, ...]]:
    reason: Exception | None = None
    for side in sides:
        try:
            backbone(torch.zeros(1, 3, side, side).to(example))
        except (RuntimeError, AssertionError, ValueError) as error:  # a transformer takes one size only
            reason = reason or error
            taps.forget()
        else:
            return taps.take([(1,)])
    raise ValueError(
        f"the backbone cannot process an image of {', '.join(map(str, sides))} pixels ({reason})"
    ) from reason


def _refused(kind: type) -> str | None:
    return next((_REFUSED[base.__name__] for base in kind.__mro__ if base.__name__ in _REFUSED), None)


def _path(name: str, modules: Mapping[str, nn.Module], backbone: nn.Module) -> str:
    """Return the path of the module that a name means."""
    if name and name in modules:
        return name
    found = [path for path in modules if name and path.endswith(f".{name}")]
    shallow = [path for path in found if path.count(".") == min(each.count(".") for each in found)]
    if len(shallow) == 1:
        return shallow[0]
    if shallow:
        raise ValueError(f"the backbone has several submodules {name!r}: {', '.join(shallow)}; give a whole name")
    children = ", ".join(child for child, _ in backbone.named_children()) or "none"
    raise ValueError(f"the backbone has no submodule {name!r}; its children are {children}")


def _is_trained(backbone: nn.Module, module: nn.Module) -> bool:
    """Return whether the module, or one that is registered before it, has parameters that are trained."""
    own, reached = set(module.modules()), False
    for each in backbone.modules():
        if each in own:
            reached = True
        elif reached:
            return False
        if any(parameter.requires_grad for parameter in each.parameters(recurse=False)):
            return True
    return False
