"""Projection heads: the layers of the published ones, and their state-dict keys."""

import pytest
import torch
from torch import nn

from plugins.heads import mlp_head, plain_head
from plugins.methods import METHODS


def hidden(width_in, width_out, bias=True):
    return [nn.Linear(width_in, width_out, bias=bias), nn.BatchNorm1d(width_out), nn.ReLU()]


PUBLISHED = {
    "byol": (mlp_head(6, 12, 4), [*hidden(6, 12), nn.Linear(12, 4)]),
    "ssl_ey, solo-learn": (mlp_head(6, 12, 4, layers=3), [*hidden(6, 12), *hidden(12, 12), nn.Linear(12, 4)]),
    "ssl_ey, vicreg": (
        mlp_head(6, 12, 4, layers=3, final_bias=False),
        [*hidden(6, 12), *hidden(12, 12), nn.Linear(12, 4, bias=False)],
    ),
    "ssl_ey, vicreg, two widths": (
        mlp_head(6, (12, 8), 4, final_bias=False),
        [*hidden(6, 12), *hidden(12, 8), nn.Linear(8, 4, bias=False)],
    ),
    "ssl_ey, lightly": (mlp_head(6, 12, 4, bias=False), [*hidden(6, 12, False), nn.Linear(12, 4)]),
    "simsiam": (
        mlp_head(6, 12, 4, layers=3, bias=False, final_norm="plain", final_bias="frozen"),
        [*hidden(6, 12, False), *hidden(12, 12, False), nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False)],
    ),
    "affine": (mlp_head(6, 12, 4, final_norm="affine"), [*hidden(6, 12), nn.Linear(12, 4), nn.BatchNorm1d(4)]),
    "one layer": (mlp_head(6, 12, 4, layers=1), [nn.Linear(6, 4)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_is_the_plain_sequence_it_replaces(name):
    torch.manual_seed(0)
    head, layers = PUBLISHED[name]
    plain = nn.Sequential(*layers)
    assert repr(head) == repr(plain)
    head.load_state_dict(plain.state_dict(), strict=True)
    h = torch.randn(8, 6)
    assert torch.equal(head(h), plain(h))


def test_keys_are_those_of_a_flat_sequence():
    keys = [key for key in mlp_head(6, 12, 4, layers=3).state_dict() if key.endswith("weight")]
    assert keys == ["0.weight", "1.weight", "3.weight", "4.weight", "6.weight"]


def test_frozen_bias_is_kept_but_not_trained():
    head = mlp_head(6, 12, 4, layers=3, bias=False, final_norm="plain", final_bias="frozen")
    assert [name for name, p in head.named_parameters() if not p.requires_grad] == ["6.bias"]
    assert "6.bias" in head.state_dict()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 0}, "layers"),
        ({"final_norm": "batch"}, "final_norm"),
        ({"in_dim": 0}, "in_dim"),
        ({"hidden_dim": -1}, "hidden_dim"),
        ({"hidden_dim": (8, 0)}, "hidden_dim"),
        ({"out_dim": 0}, "out_dim"),
    ],
)
def test_rejects_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        mlp_head(**{"in_dim": 6, "hidden_dim": 12, "out_dim": 4, **options})


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_plain_head_has_activations_between_its_linear_layers(layers, norm):
    head = plain_head(5, 6, 4, layers=layers, activation=nn.GELU, norm=norm)
    hidden = ["Linear", *(["BatchNorm1d"] if norm else []), "GELU"]
    assert [type(module).__name__ for module in head] == [*hidden * (layers - 1), "Linear"]
    assert head(torch.zeros(2, 5)).shape == (2, 4)
    free = plain_head(5, 6, 4, layers=layers, norm=norm, final_bias=False)
    assert [module.bias is None for module in free if isinstance(module, nn.Linear)] == [False] * (layers - 1) + [True]
    with pytest.raises(ValueError, match=r"layers must be in \[1, inf\), got 0"):
        plain_head(5, 6, 4, layers=0)


@pytest.mark.parametrize("name", ["ssl_ey", "vicreg"])
def test_hidden_layers_of_different_widths_as_vicregs_mlp(name):
    """``--mlp 12-8-4`` of main_ssley.py and main_vicreg.py."""
    spec = METHODS[name]
    head = spec.head(6, spec.resolve({"proj_hidden_widths": "12-8", "proj_output_dim": 4}))
    assert [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)] == [(12, 6), (8, 12), (4, 8)]
    for wrong in ("12-", "12-0", "12,8", "12-8-x", "same"):
        with pytest.raises(ValueError, match="proj_hidden_widths must be equal, or widths such as 8192-4096, got '"):
            spec.head(6, spec.resolve({"proj_hidden_widths": wrong}))
