"""Feature maps from inside a backbone, for heads that compare local features."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_REFUSED = ("FullyShardedDataParallel", "FSDPModule", "CheckpointWrapper")
"""Classes of modules that shard the parameters, or compute the forward pass again in the backward pass."""


class FeatureTaps:
    """Keep the outputs of named modules of a backbone, ``[B, C, H, W]``, while it is in training mode.

    The backbone is called as ever; its result does not change. After the forward passes of all views, :meth:`take`
    returns the maps and forgets them. A deep copy of the backbone, such as a teacher, keeps no maps: attach taps of
    its own to it.

    Args:
        backbone: the module to tap.
        sizes: name of a submodule, as in ``backbone.named_modules()`` → side of its map, > 0. A larger map is reduced
            by adaptive average pooling; None keeps the map as it is.

    Raises:
        ValueError: there is no submodule of a name, a size is out of range, or the backbone is wrapped in FSDP or
            activation checkpointing, with which maps would lack their gradients.

    Example:
        >>> backbone = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        >>> taps = FeatureTaps(backbone, {"0": 2})
        >>> _ = backbone(torch.zeros(4, 3, 8, 8))
        >>> [[tuple(map.shape) for map in view] for view in taps.take(2)]
        [[(2, 5, 2, 2)], [(2, 5, 2, 2)]]
    """

    def __init__(self, backbone: nn.Module, sizes: Mapping[str, int | None]) -> None:
        modules = dict(backbone.named_modules())
        for module in modules.values():
            kinds = {base.__name__ for base in type(module).__mro__}
            if refused := kinds.intersection(_REFUSED):
                raise ValueError(
                    f"the backbone is wrapped in {min(refused)}, which allows no feature maps; train it with "
                    "DistributedDataParallel and without activation checkpointing"
                )
        for name, size in sizes.items():
            if not name or name not in modules:
                raise ValueError(f"the backbone has no submodule {name!r}; its children are {_children(backbone)}")
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"the size of {name} must be an integer > 0 or None, got {size!r}")
        self._taps = [_Tap(size) for size in sizes.values()]
        self._names = [*sizes]
        self._handles = [modules[name].register_forward_hook(tap) for name, tap in zip(sizes, self._taps, strict=True)]

    def take(self, views: int) -> list[tuple[Tensor, ...]]:
        """Return the maps of each view since the last call, in the order of ``sizes``, and forget them.

        The backbone may have been called once per view, or on several views concatenated.

        Args:
            views: number V > 0 of views. Each has the same number of images.

        Returns:
            V tuples with one map ``[B, C, H, W]`` per tapped module.

        Raises:
            ValueError: the backbone has not been called in training mode, its calls do not make V views, or a map has
                no gradient because of activation checkpointing.
        """
        try:
            kept = [tap.kept for tap in self._taps]
            for name, maps in zip(self._names, kept, strict=True):
                rows = sum(len(part) for part in maps)
                if not rows or rows % views:
                    raise ValueError(
                        f"the maps of {name} have {rows} rows, which are not {views} views of equal size; "
                        "call the backbone in training mode on all views first"
                    )
                if torch.is_grad_enabled() and any(tap.lacks_gradient for tap in self._taps):
                    raise ValueError(
                        f"the maps of {name} have no gradient; switch off the activation checkpointing of the backbone"
                    )
            return [*zip(*(torch.cat(maps).chunk(views) for maps in kept), strict=True)]
        finally:
            self.clear()

    def clear(self) -> None:
        """Forget all maps."""
        for tap in self._taps:
            tap.kept, tap.lacks_gradient = [], False

    def remove(self) -> None:
        """Remove the hooks from the backbone."""
        for handle in self._handles:
            handle.remove()
        self.clear()


class _Tap:
    """The forward hook of one module."""

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.kept: list[Tensor] = []
        self.lacks_gradient = False

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # a checkpointed region is computed again
        if not module.training or in_backward:
            return
        trained = any(parameter.requires_grad for parameter in module.parameters())
        # reentrant checkpointing makes the forward pass without gradient
        self.lacks_gradient |= trained and not torch.is_grad_enabled()
        larger = self.size is not None and max(output.shape[-2:]) > self.size
        self.kept.append(F.adaptive_avg_pool2d(output, self.size) if larger else output)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Inactive":
        return _Inactive()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Inactive, ())


class _Inactive:
    """The hook that a copy of a tapped module has: it keeps nothing."""

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> None:
        return


def _children(backbone: nn.Module) -> str:
    return ", ".join(name for name, _ in backbone.named_children()) or "none"
