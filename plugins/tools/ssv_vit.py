"""The vision transformer of the repository Self-Supervised-Vision, for images of two sizes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plugins.checks import check_whole


class Block(nn.Module):
    """Self-attention, then an MLP; each adds its output to its *normalised* input: ``y = LN(x)``, ``y + f(y)``.

    Attention has no output layer, and its projections no biases.

    Args:
        dim: width of the tokens.
        heads: number of attention heads, a divisor of ``dim``.
        inner: width of the MLP's hidden layer.
    """

    def __init__(self, dim: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``[B, T, dim]`` to ``[B, T, dim]``."""
        y = self.norm1(tokens)
        # attention sees the tokens themselves, not the normalised ones
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = y + F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.norm2(y) + self.mlp(y)


class SSVViT(nn.Module):
    """Patches and a class token, with concatenated positions: ``[B, 3, S, S] → [B, hidden_dim]``, the class token.

    Patches are not projected first: a token is the 3 ``patch_size``² pixels of a patch, or the class token of that
    width, followed by the embedding of its position. A Linear layer maps it to ``hidden_dim``. Images with
    ``num_global_patches`` and with ``num_local_patches`` patches have embeddings of their own.

    Args:
        hidden_dim: width of the tokens and of the features.
        embedding_dim: width of the position embeddings.
        intermediate_dim: width of the hidden layers of the MLPs.
        num_attention_heads: heads, a divisor of ``hidden_dim``.
        patch_size: side of a patch, in pixels.
        num_local_patches: patches of small crops: 4 of 8 pixels.
        num_global_patches: patches of large views: 64 of 32 pixels.
        num_encoder_layers: number of blocks.

    Attributes:
        num_features: ``hidden_dim``.

    Raises:
        ValueError: an argument is out of range; in a call, the images have another number of patches.

    Reference:
        the configuration dino.yaml of github.com/NishantPrabhu/Self-Supervised-Vision.

    >>> SSVViT(num_encoder_layers=1)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 384])
    """

    def __init__(
        self,
        *,
        hidden_dim: int = 384,
        embedding_dim: int = 192,
        intermediate_dim: int = 768,
        num_attention_heads: int = 6,
        patch_size: int = 4,
        num_local_patches: int = 4,
        num_global_patches: int = 64,
        num_encoder_layers: int = 6,
    ) -> None:
        super().__init__()
        sizes = {"embedding_dim": embedding_dim, "intermediate_dim": intermediate_dim, "patch_size": patch_size}
        counts = {"num_local_patches": num_local_patches, "num_global_patches": num_global_patches}
        blocks = {"num_attention_heads": num_attention_heads, "num_encoder_layers": num_encoder_layers}
        for name, value in {"hidden_dim": hidden_dim, **sizes, **counts, **blocks}.items():
            check_whole(name, value, low=1)
        if hidden_dim % num_attention_heads:
            raise ValueError(
                f"hidden_dim must be a multiple of num_attention_heads = {num_attention_heads}, got {hidden_dim}"
            )
        self.num_features, self.patch_size = hidden_dim, patch_size
        pixels = 3 * patch_size**2
        self.class_token = nn.Parameter(torch.randn(1, 1, pixels))
        self.positions = nn.ParameterDict(
            {str(count): nn.Parameter(torch.randn(1, count + 1, embedding_dim)) for count in {*counts.values()}}
        )
        self.project = nn.Linear(pixels + embedding_dim, hidden_dim)
        self.blocks = nn.Sequential(
            *(Block(hidden_dim, num_attention_heads, intermediate_dim) for _ in range(num_encoder_layers))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the class token after the last block."""
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        rows, count = patches.shape[:2]
        if str(count) not in self.positions:
            known = " or ".join(self.positions)
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels have {count} patches of {self.patch_size} "
                f"pixels, but the network has positions for {known}; change num_global_patches or num_local_patches"
            )
        tokens = torch.cat([self.class_token.expand(rows, -1, -1).to(patches.dtype), patches], 1)
        positions = self.positions[str(count)].expand(rows, -1, -1)
        return self.blocks(self.project(torch.cat([tokens, positions], 2)))[:, 0]
