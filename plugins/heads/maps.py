"""Base class of heads that project feature maps beside the features."""

from collections.abc import Sequence

from torch import Tensor, nn


class MapHead(nn.Module):
    """A head of a method whose ``taps`` name modules of the backbone: it projects their maps too.

    ``forward`` maps the features ``[B, features_dim]`` to ``[B, D]`` as in any head. Evaluation and teachers call it
    alone.
    """

    def build(self, channels: Sequence[int]) -> None:
        """Make the layers for the maps. It is called once, before the parameters are counted, copied or loaded.

        Args:
            channels: number of channels of each map, in the order of the method's ``taps``.
        """
        raise NotImplementedError

    def project_maps(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Project the maps of one view.

        Args:
            maps: ``[B, C, H, W]`` of each tapped module, with gradient.

        Returns:
            Any tensors with B rows, such as ``[B, D, H, W]`` for each map. The loss gets them as ``Embeddings.maps``.
        """
        raise NotImplementedError
