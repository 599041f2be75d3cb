"""CPC's head: from the features of a grid of patches to predictions of the rows below, and to their targets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plugins.checks import check_whole
from plugins.heads.context import context_network
from plugins.heads.maps import StackHead

DIRECTIONS = (1, 2, 4)


class CPCHead(StackHead):
    """Predict the features of each row of patches from the rows that precede it.

    ``z [B, F, G, G]`` are the features of the patches, row by row. A target is ``y = W z + b`` of width D. The context
    c of row i, made from the rows up to i, predicts the row i + k: ``p^k = W_k c + b_k``, with layers of its own
    for each direction and offset k. The grid is turned clockwise by 90 degrees from one direction to the next (two
    directions: by 180 degrees), and all directions share the context network.

    ``forward`` maps the features of images ``[B, F]``, or of stacks ``[B, G², F]``, to the embedding ``[B, D]``: the
    target layer of the mean over the patches.

    Args:
        features_dim: F, the width of the features.
        dim: D, the width of targets and predictions; None has no target layer, y = z, and no biases b_k, so that the
            score ``⟨p^k, y⟩ = zᵀ W_k c`` is that of CPC v1.
        grid: G, patches per side.
        offsets: the offsets k, in 1 … G−1.
        context: a key of :data:`plugins.heads.context.CONTEXTS`.
        hidden: hidden width of the context network ``pixelcnn``.
        directions: 1 (downwards), 2 (and upwards) or 4.

    Raises:
        ValueError: an argument is out of range, an unknown context; in a call, the features have another shape.

    Reference:
        van den Oord, Li & Vinyals 2018, arXiv:1807.03748, eqs. 3 and 4; Hénaff et al. 2019, arXiv:1905.09272.

    Example:
        >>> head = CPCHead(16, 8, grid=4, offsets=[2, 3], hidden=8, directions=2)
        >>> features = torch.zeros(5, 16, 16)
        >>> head(features).shape
        torch.Size([5, 8])
        >>> [tuple(part.shape) for part in head.project_stack(features)]  # targets, and the rows of each offset
        [(5, 2, 8, 4, 4), (5, 2, 8, 2, 4), (5, 2, 8, 1, 4)]
    """

    def __init__(
        self,
        features_dim: int,
        dim: int | None = 64,
        *,
        grid: int = 7,
        offsets: Sequence[int] = (2, 3, 4, 5, 6),
        context: str = "pixelcnn",
        hidden: int = 256,
        directions: int = 1,
    ) -> None:
        super().__init__()
        for name, value in {"features_dim": features_dim, "grid": grid}.items():
            check_whole(name, value, low=1)
        if directions not in DIRECTIONS:
            raise ValueError(f"directions must be one of 1, 2, 4, got {directions!r}")
        if not offsets or not all(type(k) is int and 0 < k < grid for k in offsets) or len({*offsets}) < len(offsets):
            raise ValueError(f"offsets must be distinct integers from 1 to grid - 1 = {grid - 1}, got {[*offsets]}")
        self.features_dim, self.grid, self.offsets = features_dim, grid, tuple(offsets)
        self.turns = [turn * (4 // max(directions, 2)) for turn in range(directions)]
        self.target = nn.Identity() if dim is None else nn.Linear(features_dim, dim)
        self.context = context_network(context, features_dim, hidden)
        self.predictions = nn.ModuleList(
            nn.ModuleList(nn.Linear(features_dim, dim or features_dim, bias=dim is not None) for _ in offsets)
            for _ in self.turns
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings of images or of stacks."""
        if features.ndim == 2:
            return self.target(features)
        self._check(features)
        return self.target(features.mean(1))

    def project_stack(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the targets and the predictions of each offset.

        Args:
            features: ``[B, G², F]``, row by row.

        Returns:
            The targets ``[B, directions, D, G, G]``, then ``[B, directions, D, G − k, G]`` for each offset k: the
            predictions of the rows k … G−1, from the contexts of the rows 0 … G−1−k.
        """
        self._check(features)
        side = self.grid
        z = features.transpose(1, 2).unflatten(2, (side, side))
        y = self.target(features).transpose(1, 2).unflatten(2, (side, side))
        context = self.context(torch.stack([turned(z, turn) for turn in self.turns], 1).flatten(0, 1))
        rows = context.permute(0, 2, 3, 1).unflatten(0, (len(z), len(self.turns)))  # [B, directions, G, G, F]
        found = [torch.stack([turned(y, turn) for turn in self.turns], 1)]
        for place, k in enumerate(self.offsets):
            layers = [of_direction[place] for of_direction in self.predictions]  # type: ignore[index]
            of_offset = [layer(rows[:, number, : side - k]) for number, layer in enumerate(layers)]
            found.append(torch.stack(of_offset, 1).movedim(-1, 2))
        return tuple(found)

    def _check(self, features: Tensor) -> None:
        if features.ndim != 3 or features.shape[1] != self.grid**2:
            raise ValueError(
                f"the head takes features [B, {self.features_dim}] of images, or [B, {self.grid**2}, "
                f"{self.features_dim}] of stacks of {self.grid} x {self.grid} patches, got shape "
                f"{tuple(features.shape)}; set the option grid to the number of patches per side that the "
                "augmentations make"
            )


def turned(maps: Tensor, turns: int) -> Tensor:
    """Turn maps ``[..., G, G]`` clockwise by ``turns`` times 90 degrees.

    >>> turned(torch.tensor([[1, 2], [3, 4]]), 1)
    tensor([[3, 1],
            [4, 2]])
    """
    for _ in range(turns):
        maps = maps.transpose(-1, -2).flip(-1)
    return maps
