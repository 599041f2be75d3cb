"""CPC's context networks: from a grid of features to a context that depends on the rows above and on the own row."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from plugins.checks import check_choice, check_whole


class PixelCNNContext(nn.Module):
    """Sum the grid and five causal residual branches: ``[B, C, G, G] → [B, C, G, G]``.

    Each of the branches is a 1×1 convolution C → h, ReLU, a 1×3 convolution with zero padding, a 2×1 convolution over
    the row above and the own row, ReLU, and a 1×1 convolution h → C. One ReLU ends the network. Row i depends on the
    rows i−5 … i, and column j on the columns j−5 … j+5.

    Args:
        width: C, the width of the features.
        hidden: h.

    Raises:
        ValueError: an argument is below 1.

    Reference:
        Hénaff et al. 2019, arXiv:1905.09272, appendix.

    Example:
        >>> import torch
        >>> PixelCNNContext(4, 8)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    DEPTH = 5

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        for name, value in {"width": width, "hidden": hidden}.items():
            check_whole(name, value, low=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, hidden, 1),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
                nn.ZeroPad2d((0, 0, 1, 0)),
                nn.Conv2d(hidden, hidden, (2, 1)),
                nn.ReLU(),
                nn.Conv2d(hidden, width, 1),
            )
            for _ in range(self.DEPTH)
        )

    def forward(self, grid: Tensor) -> Tensor:
        """Return the context."""
        for block in self.blocks:
            grid = grid + block(grid)
        return grid.relu()


class _GatedLayer(nn.Module):
    """A vertical branch, which sees the row above and the own row, and a horizontal branch, which sees its output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 3), padding=(0, 1))
        self.across = nn.Conv2d(2 * width, 2 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.vertical(F.pad(vertical, (1, 1, 1, 0)))
        mixed = _gate(self.horizontal(horizontal) + self.across(seen))
        return _gate(seen), horizontal + self.out(mixed)


def _gate(maps: Tensor) -> Tensor:
    value, gate = maps.chunk(2, 1)
    return value.tanh() * gate.sigmoid()


class GatedContext(nn.Module):
    """Pass the grid through four gated layers of a vertical and a horizontal branch: ``[B, C, G, G] → [B, C, G, G]``.

    A gate is tanh(a) σ(b) of the two halves of the channels. The vertical branch convolves the row above and the own
    row with three columns; the horizontal branch adds the own row. Row i depends on the rows i−4 … i.

    Args:
        width: C, the width of the features.

    Raises:
        ValueError: ``width`` is below 1.

    Reference:
        van den Oord et al. 2016, arXiv:1606.05328, figure 2; as the context in arXiv:1807.03748, section 3.2.

    Example:
        >>> import torch
        >>> GatedContext(4)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    DEPTH = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        check_whole("width", width, low=1)
        self.layers = nn.ModuleList(_GatedLayer(width) for _ in range(self.DEPTH))

    def forward(self, grid: Tensor) -> Tensor:
        """Return the context."""
        vertical = horizontal = grid
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return horizontal


class GRUContext(nn.Module):
    """Run a GRU down each column of the grid: ``[B, C, G, G] → [B, C, G, G]``.

    Row i depends on the rows 0 … i of the same column. The state has the width C.

    Args:
        width: C, the width of the features.

    Raises:
        ValueError: ``width`` is below 1.

    Reference:
        van den Oord, Li & Vinyals 2018, arXiv:1807.03748, section 3.2, which reports results similar to those of a
        PixelCNN.

    Example:
        >>> import torch
        >>> GRUContext(4)(torch.zeros(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        check_whole("width", width, low=1)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, grid: Tensor) -> Tensor:
        """Return the context."""
        batch, width, rows, columns = grid.shape
        states, _ = self.gru(grid.permute(0, 3, 2, 1).reshape(batch * columns, rows, width))
        return states.view(batch, columns, rows, width).permute(0, 3, 2, 1)


CONTEXTS: dict[str, Callable[[int, int], nn.Module]] = {
    "pixelcnn": PixelCNNContext,
    "gated": lambda width, _hidden: GatedContext(width),
    "gru": lambda width, _hidden: GRUContext(width),
}
"""Name of a context network → function of the width and of the hidden width, which only ``pixelcnn`` has."""


def context_network(name: str, width: int, hidden: int = 256) -> nn.Module:
    """Build a context network.

    Args:
        name: a key of CONTEXTS.
        width: C, the width of the features.
        hidden: hidden width of ``pixelcnn``.

    Raises:
        ValueError: an unknown name, or a width below 1.

    >>> context_network("gru", 8)
    GRUContext(
      (gru): GRU(8, 8, batch_first=True)
    )
    """
    check_choice("context", name, tuple(CONTEXTS))
    return CONTEXTS[name](width, hidden)
