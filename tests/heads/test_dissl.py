"""Heads of DISSL and CISSL: the published layers, their counts and their initialisation."""

import copy

import pytest
import torch
from torch import nn

from plugins.heads import Heads, dissl_heads, issl_head, issl_init_, projection_init_
from plugins.heads.dissl import KINDS, Residual, UnitRows


def hidden(width_in, width_out, act=nn.ReLU):
    return [nn.Linear(width_in, width_out, bias=False), nn.BatchNorm1d(width_out), act()]


def low_rank(width_in, width_out):
    return [nn.Linear(width_in, 512, bias=False), nn.BatchNorm1d(512), nn.Linear(512, width_out)]


def plain(kind, z, out):
    """The layers one by one: teacher, student."""
    residual = Residual(*hidden(z, 2048), *hidden(2048, z))
    wide = [*hidden(z, 512), Residual(*hidden(512, 2048), *hidden(2048, 2048), *hidden(2048, 512)), nn.Linear(512, out)]
    expressive = wide if z > 2048 else [residual, *hidden(z, 512), nn.Linear(512, out)]
    normed = [nn.Linear(z, out), nn.BatchNorm1d(out)]
    return {
        "dissl": ([*hidden(z, 1024), *low_rank(1024, out)], low_rank(z, out)),
        "dissl_mlp": ([*hidden(z, 2048), *hidden(2048, 2048), *low_rank(2048, out)],) * 2,
        "cissl": ([*hidden(z, 1024), nn.Linear(1024, out), nn.BatchNorm1d(out)], normed),
        "cissl_mlp": ([*hidden(z, 2048), *hidden(2048, 2048), nn.Linear(2048, out), nn.BatchNorm1d(out)],) * 2,
        "simclr": ([*hidden(z, 1024), nn.Linear(1024, out), nn.BatchNorm1d(out)],) * 2,
        "fork_dissl": (expressive, low_rank(z, out)),
        "fork_dissl_linear": (low_rank(z, out),) * 2,
        "fork_dissl_mlp": (expressive,) * 2,
        "fork_dissl_v2": ([residual, nn.Linear(z, out)], [nn.Linear(z, out)]),
        "fork_cissl": (
            [*hidden(z, 2048), *hidden(2048, 2048), nn.Linear(2048, out, bias=False), nn.BatchNorm1d(out)],
            [nn.Linear(z, out, bias=False), nn.BatchNorm1d(out)],
        ),
    }[kind]


@pytest.mark.parametrize("width", [512, 4096])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dino"])
def test_layers_are_the_published_ones(kind, width):
    with torch.device("meta"):
        heads = dissl_heads(kind, width, 128)
        for head, layers in zip(heads, plain(kind, width, 128), strict=True):
            # one layer alone is no sequence
            found = head if isinstance(head, nn.Sequential) else nn.Sequential(head)
            assert repr(found) == repr(nn.Sequential(*layers))
    assert (heads.teacher is heads.student) == (kind == "simclr")


@pytest.mark.parametrize(
    ("kind", "width", "teacher", "student"),
    [
        # 512 * 1024 + 2 * 1024 + 1024 * 512 + 2 * 512 + 512 * 16384 + 16384, and without the first
        ("dissl", 512, 9456640, 8668160),
        ("cissl", 512, 657792, 65920),
        ("fork_dissl", 2048, 17851392, 9454592),
    ],
)
def test_parameter_counts(kind, width, teacher, student):
    with torch.device("meta"):
        heads = dissl_heads(kind, width, 128 if kind == "cissl" else 16384)
    assert [sum(p.numel() for p in head.parameters()) for head in heads] == [teacher, student]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_parameter_learns(kind):
    torch.manual_seed(0)
    heads = dissl_heads(kind, 12, 6)
    z = torch.randn(16, 12)
    sum((head(z) * torch.randn(16, 6)).sum() for head in heads).backward()
    for head in heads:
        assert head(z).shape == (16, 6)
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_residual_adds_its_input():
    block = Residual(nn.Linear(3, 3), nn.ReLU())
    x = torch.randn(4, 3)
    torch.testing.assert_close(block(x), block[0](x).relu() + x)


def test_cosine_head_is_weight_normed_with_its_input_normed_before_the_bottleneck():
    torch.manual_seed(0)
    head = issl_head(
        5, 4, layers=1, hidden_dim=8, activation="gelu", bottleneck=3, bottleneck_norm=False, last="cosine"
    )
    assert repr(head) == repr(dissl_heads("dino", 5, 4).student).replace("1024", "8").replace("256", "3")
    z = torch.randn(6, 5)
    h = nn.functional.gelu(head[1](head[0](z)))
    h = (h / h.norm(dim=1, keepdim=True)) @ head[4].weight.T
    weight = head[5].weight
    torch.testing.assert_close(head(z), h @ (weight / weight.norm(dim=1, keepdim=True)).T)
    with torch.no_grad():
        weight.mul_(7)
    torch.testing.assert_close(copy.deepcopy(head)(z), head(z))
    torch.testing.assert_close(head(z), h @ (weight / weight.norm(dim=1, keepdim=True)).T)


def test_initialisations():
    torch.manual_seed(0)
    heads = dissl_heads("dissl", 512, 4096)
    for head in heads:
        for module in head:
            if isinstance(module, nn.Linear):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.01)
                assert module.bias is None or not module.bias.any()
    conv = issl_init_(nn.Conv2d(64, 256, 3))
    assert conv.weight.std().item() == pytest.approx((64 * 9) ** -0.5 / 0.8796, rel=0.01) and not conv.bias.any()
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    assert issl_init_(nn.Sequential(norm))[0].weight.eq(1).all() and norm.bias.eq(0).all()
    narrow, wide = nn.Linear(1024, 256), nn.Linear(256, 1024)
    before = wide.weight.clone()
    projection_init_(nn.Sequential(narrow, wide))
    assert narrow.weight.std().item() == pytest.approx(1 / 16, rel=0.01)
    assert torch.equal(wide.weight, before)
    teacher, student = dissl_heads("fork_cissl", 512, 128)
    assert student[0].weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert teacher[-2].weight.std().item() == pytest.approx(128**-0.5, rel=0.02)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": -1}, "layers"),
        ({"in_dim": 0}, "in_dim"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"bottleneck": -1}, "bottleneck"),
        ({"activation": "tanh"}, "activation must be one of relu, gelu"),
        ({"last": "sine"}, "last must be one of linear, cosine"),
    ],
)
def test_rejects_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        issl_head(**{"in_dim": 6, "out_dim": 4, **options})


def test_rejects_bad_kinds():
    with pytest.raises(ValueError, match="kind must be one of dissl, dissl_mlp"):
        dissl_heads("disl", 4, 4)
    with pytest.raises(ValueError, match="out_dim"):
        dissl_heads("fork_dissl", 4, 0)
    assert isinstance(dissl_heads("simclr", 4, 4), Heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_row_has_no_direction_and_no_gradient(dtype):
    """Divided by the smallest allowed norm, its gradient was 1e12 times the incoming one."""
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    unit = UnitRows()(rows)
    (gradient,) = torch.autograd.grad(unit[:, 0].sum(), rows)
    assert unit.dtype == dtype and unit[1].tolist() == [0, 0] and gradient[1].tolist() == [0, 0]
    torch.testing.assert_close(gradient[0].float(), torch.tensor([0.128, -0.096]), rtol=2e-2, atol=0)
