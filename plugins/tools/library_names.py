"""Rename the weights of VISSL's trunks to the names in torchvision and timm.

A ResNet has the same names everywhere. VISSL's RegNet is torchvision's under other names, its vision transformer has
timm's names, and its XCiT and ConViT are timm's with some tensors joined or in another form.
"""

import re
from collections.abc import Mapping

from torch import Tensor

_REGNET = {
    r"^conv1\.stem\.": "stem.",
    r"^res\d+\.block(\d+)-": r"trunk_output.block\1.block\1-",
    r"(-\d+)\.proj\.weight": r"\1.proj.0.weight",
    r"(-\d+)\.bn\.": r"\1.proj.1.",
    r"\.f\.se\.excitation\.0\.": ".f.se.fc1.",
    r"\.f\.se\.excitation\.2\.": ".f.se.fc2.",
    r"\.f\.c\.weight": ".f.c.0.weight",
    r"\.f\.final_bn\.": ".f.c.1.",
}
_TRANSFORMER = {
    r"^cls_token$": "class_token",
    r"^pos_embed$": "encoder.pos_embedding",
    r"^patch_embed\.proj\.": "conv_proj.",
    r"^norm\.": "encoder.ln.",
    r"^blocks\.(\d+)\.": r"encoder.layers.encoder_layer_\1.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.(weight|bias)": r".self_attention.in_proj_\1",
    r"\.attn\.proj\.": ".self_attention.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
}
_CONVIT = {
    r"^class_token$": "cls_token",
    r"^pos_embedding$": "pos_embed",
    r"\.attn\.alpha$": ".attn.gating_param",
    r"\.mlp\.linear_": ".mlp.fc",
}


def library_names(state: Mapping[str, Tensor], target: str) -> dict[str, Tensor]:
    """Rename the weights of a VISSL trunk to the names of a library; other weights are returned unchanged.

    Args:
        state: state dict of a backbone, name → tensor.
        target: "torchvision" or "timm".

    Returns:
        The state dict with the names of the library.

    >>> import torch
    >>> list(library_names({"res2.block1-0.f.c.weight": torch.zeros(1)}, "torchvision"))
    ['trunk_output.block1.block1-0.f.c.0.weight']
    """
    if any(re.match(r"res\d+\.block\d+-", name) for name in state):
        return _renamed(state, _REGNET)
    if target == "torchvision" and {"cls_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= set(state):
        return _renamed(state, _TRANSFORMER)
    if target == "timm" and any(name.startswith("pos_embeder.") for name in state):
        return _xcit(state)
    if target == "timm" and "blocks.0.attn.alpha" in state:
        return {name: _convit(name, value) for name, value in _renamed(state, _CONVIT).items()}
    return dict(state)


def _renamed(state: Mapping[str, Tensor], rules: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in rules.items():
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


def _xcit(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the joint query-key-value layer of the class attention into timm's three layers."""
    renamed = {}
    for name, value in state.items():
        name = name.replace("pos_embeder.", "pos_embed.")
        if name.startswith("cls_attn_blocks.") and ".attn.qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                renamed[name.replace(".qkv.", f".{part}.")] = rows.clone()
        else:
            renamed[name] = value
    return renamed


def _convit(name: str, value: Tensor) -> Tensor:
    """Average the LOCALITY_DIM copies of each relative position, as VISSL's layer does."""
    if name.endswith(".gating_param"):
        return value.flatten()
    if name.endswith(".pos_proj.weight"):
        return value.unflatten(1, (3, -1)).mean(2)
    return value
