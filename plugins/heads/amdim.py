"""AMDIM's head: residual projections of the features of an image, and of the locations of two maps."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from plugins.checks import check_whole
from plugins.heads.maps import MapHead


class ResidualProjection(nn.Module):
    """Project each location of a map, ``[B, F, H, W] → [B, D, H, W]``, or each row of a matrix, ``[B, F] → [B, D]``.

    ``BN(W₂ relu(W₁ x) + S x + b)``, where the layers W₁ (F → D), W₂ (D → D) and the shortcut S (F → D) are the same at
    all locations. W₂ is 0 at first. The entries of S are uniform in [−0.01, 0.01], with 1 on the diagonal if D ≥ F, so
    that the projection first is about the identity.

    Args:
        features_dim: width F.
        dim: width D.
        norm: whether BatchNorm follows W₁, too.

    Raises:
        ValueError: an argument is below 1.

    Reference:
        Bachman, Hjelm & Buchwalter 2019, arXiv:1906.00910, section 4.1, and the published code.

    Example:
        >>> project = ResidualProjection(3, 5)
        >>> project(torch.zeros(2, 3)).shape, project(torch.zeros(2, 3, 7, 7)).shape
        (torch.Size([2, 5]), torch.Size([2, 5, 7, 7]))
    """

    def __init__(self, features_dim: int, dim: int, *, norm: bool = False) -> None:
        super().__init__()
        for name, value in {"features_dim": features_dim, "dim": dim}.items():
            check_whole(name, value, low=1)
        between = [nn.BatchNorm2d(dim)] if norm else []
        last = nn.Conv2d(dim, dim, 1, bias=False)
        self.branch = nn.Sequential(nn.Conv2d(features_dim, dim, 1, bias=False), *between, nn.ReLU(), last)
        self.shortcut = nn.Conv2d(features_dim, dim, 1)
        self.norm = nn.BatchNorm2d(dim)
        with torch.no_grad():
            last.weight.zero_()
            weight = self.shortcut.weight.uniform_(-0.01, 0.01)[..., 0, 0]
            if dim >= features_dim:
                weight.fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the projections."""
        maps = x if x.ndim == 4 else x[..., None, None]
        return self.norm(self.branch(maps) + self.shortcut(maps)).view(*x.shape[:1], -1, *x.shape[2:])


class AMDIMHead(MapHead):
    """Project the features of an image with φ₁, and the maps of two modules of the backbone with a φ each.

    Args:
        features_dim: width F of the features.
        dim: width D of the embeddings.
        whole: whether the features have a projection; otherwise they are the embedding, and F must be D.
        norm: as of :class:`ResidualProjection`.

    Raises:
        ValueError: a width is below 1, or F is not D without a projection.

    Example:
        >>> head = AMDIMHead(8, 16)
        >>> head.build([4, 8])
        >>> fine, coarse = head.project_maps((torch.zeros(2, 4, 7, 7), torch.zeros(2, 8, 5, 5)))
        >>> head(torch.zeros(2, 8)).shape, fine.shape, coarse.shape
        (torch.Size([2, 16]), torch.Size([2, 16, 7, 7]), torch.Size([2, 16, 5, 5]))
    """

    advice = "the options fine_map and coarse_map name the modules"

    def __init__(self, features_dim: int, dim: int, *, whole: bool = True, norm: bool = False) -> None:
        super().__init__()
        if not whole and features_dim != dim:
            raise ValueError(
                f"without a projection of the features their width is proj_output_dim: got {features_dim} features and "
                f"proj_output_dim={dim}; set proj_output_dim to {features_dim}, or project_features to True"
            )
        self.dim, self.with_norm = dim, norm
        self.whole = ResidualProjection(features_dim, dim, norm=norm) if whole else nn.Identity()

    def build(self, channels: Sequence[int]) -> None:
        """Make the projections of the finer and of the coarser map."""
        fine, coarse = channels
        self.fine = ResidualProjection(fine, self.dim, norm=self.with_norm)
        self.coarse = ResidualProjection(coarse, self.dim, norm=self.with_norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings ``[B, D]`` of the features ``[B, F]``."""
        return self.whole(features)

    def project_maps(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the embeddings ``[B, D, H, W]`` of the finer and of the coarser map."""
        fine, coarse = maps
        return self.fine(fine), self.coarse(coarse)
