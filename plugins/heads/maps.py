"""Base classes of heads that hand maps to the loss, beside the embeddings."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn


class MapHead(nn.Module):
    """A head of a method whose ``taps`` name modules of the backbone: it projects their maps too.

    ``forward`` maps the features ``[B, features_dim]`` to ``[B, D]`` as in any head. Evaluation and teachers call it
    alone.
    """

    advice: ClassVar[str] = ""
    """What to do if the backbone has no such modules, or maps that cannot be used: the end of the error's sentence."""

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


class StackHead(nn.Module):
    """A head of a method with ``stacks`` whose loss reads each patch: it projects the features of all patches too.

    ``forward`` maps the features of images ``[B, features_dim]`` and of stacks ``[B, P, features_dim]`` to ``[B, D]``
    as in any head. Evaluation calls it alone.
    """

    def project_stack(self, features: Tensor) -> tuple[Tensor, ...]:
        """Project the features of the patches of one stack.

        Args:
            features: ``[B, P, features_dim]``, with gradient.

        Returns:
            Any tensors with B rows. The loss gets them as ``Embeddings.maps``, where a view that is no stack has none.

        Raises:
            ValueError: the stack has another number of patches than the method's options say.
        """
        raise NotImplementedError
