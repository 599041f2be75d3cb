"""PIRL's head: one branch for images, one for stacks of patches, both into the same embedding."""

from torch import Tensor, nn

from plugins.checks import check_whole


class PatchHead(nn.Module):
    """Project the features of images ``[B, F]``, or of stacks of P patches ``[B, P, F]``, to embeddings ``[B, D]``.

    Images pass through ``image``. Patches pass through ``patch`` each, are concatenated in the given order, and pass
    through ``join``, a Linear layer P D → D. A stack of a single piece, such as a turned view, has no ``join``.

    Args:
        features_dim: width F of the features.
        dim: width D of the embedding.
        patches: number P of patches.
        hidden: width of the hidden layer of ``image`` and ``patch``, Linear, ReLU, Linear; None: one Linear layer each.
        norm: whether BatchNorm follows the first layer, if there is a hidden one. Its statistics are those of the
            images, or of all patches of a batch. It removes the direction that the outputs of an untrained network have
            in common; without it they take many epochs to separate.

    Raises:
        ValueError: an argument is below 1; in a call, the features have another shape.

    Reference:
        Misra & van der Maaten 2020, arXiv:1912.01991, section 3.3; hidden layers without BatchNorm are in
        VISSL's model zoo.

    Example:
        >>> import torch
        >>> head = PatchHead(64, 128, 9)
        >>> head(torch.zeros(2, 64)).shape, head(torch.zeros(2, 9, 64)).shape
        (torch.Size([2, 128]), torch.Size([2, 128]))
    """

    def __init__(
        self, features_dim: int, dim: int, patches: int = 9, *, hidden: int | None = None, norm: bool = False
    ) -> None:
        super().__init__()
        for name, value in {"features_dim": features_dim, "dim": dim, "patches": patches}.items():
            check_whole(name, value, low=1)
        self.features_dim, self.patches = features_dim, patches
        self.image = _branch(features_dim, hidden, dim, norm)
        self.patch = _branch(features_dim, hidden, dim, norm)
        self.join = nn.Linear(patches * dim, dim) if patches > 1 else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Return the embeddings of images or of stacks."""
        if features.ndim == 2:
            return self.image(features)
        if features.ndim != 3 or features.shape[1] != self.patches:
            raise ValueError(
                f"the head takes features [B, {self.features_dim}] of images, or [B, {self.patches}, "
                f"{self.features_dim}] of stacks of {self.patches} patches, got shape {tuple(features.shape)}; "
                "set the option patches to the number of patches that the augmentations make"
            )
        return self.join(self.patch(features.flatten(0, 1)).unflatten(0, features.shape[:2]).flatten(1))


def _branch(features_dim: int, hidden: int | None, dim: int, norm: bool) -> nn.Module:
    if hidden is None:
        return nn.Linear(features_dim, dim)
    check_whole("hidden", hidden, low=1)
    between = [nn.BatchNorm1d(hidden)] if norm else []
    return nn.Sequential(nn.Linear(features_dim, hidden), *between, nn.ReLU(), nn.Linear(hidden, dim))
