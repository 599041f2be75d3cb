"""Projection heads: from the features of a backbone to the space where the loss lives."""

from plugins.heads.mlp import mlp_head

__all__ = ["mlp_head"]
