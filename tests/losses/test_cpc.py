"""CPC: known values, slow reference, properties, gradients, drawn negatives, several processes, dtypes."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from plugins import linalg
from plugins.losses import CPCLoss, cpc_loss, cpc_terms, non_overlapping_offsets
from plugins.testing import assert_joined, devices, toy_mlp


def _inputs(batch=3, width=4, side=5, offsets=(2, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(batch, width, side, side, generator=generator, dtype=torch.float64)
    shapes = {k: (batch, width, side - k, side) for k in offsets}
    return {k: 3 * torch.randn(each, generator=generator, dtype=torch.float64) for k, each in shapes.items()}, made


def _reference(predictions, targets, scale=0.1, reduction="mean", chosen=None):
    """One location at a time."""
    y = targets.detach().numpy().transpose(0, 2, 3, 1)
    side = y.shape[1]
    every = y.reshape(-1, y.shape[3])
    losses = []
    for k, of_offset in predictions.items():
        p = of_offset.detach().numpy().transpose(0, 2, 3, 1)
        terms = []
        for b in range(len(p)):
            for i in range(side - k):
                for j in range(side):
                    label = (b * side + i + k) * side + j
                    columns = range(len(every)) if chosen is None else {*chosen.tolist(), label}
                    scores = {m: scale * (p[b, i, j] @ every[m]) for m in columns}
                    terms.append(np.log(sum(np.exp(s) for s in scores.values())) - scores[label])
        losses.append(np.mean(terms))
    return np.mean(losses) if reduction == "mean" else np.sum(losses)


def _plain(predictions, targets, scale=0.1):
    """The matrix of scores of each offset, left to autograd."""
    batch, width, side, _ = targets.shape
    every = targets.permute(0, 2, 3, 1).reshape(-1, width)
    images = torch.arange(batch)[:, None] * side**2
    losses = [
        torch.nn.functional.cross_entropy(
            scale * p.permute(0, 2, 3, 1).reshape(-1, width) @ every.T,
            (images + torch.arange(k * side, side**2)).flatten(),
        )
        for k, p in predictions.items()
    ]
    return torch.stack(losses).mean()


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "side", "value"), [(3, 6, 4.682131), (8, 7, 5.971262)])
def test_zero_predictions(batch, side, value):
    _, targets = _inputs(batch, 4, side)
    for k in range(1, side):
        zeros = torch.zeros(batch, 4, side - k, side, dtype=torch.float64)
        assert cpc_loss({k: zeros}, targets).item() == pytest.approx(value, abs=1e-6)
        drawn = cpc_loss({k: zeros}, targets, negatives=16, generator=torch.Generator().manual_seed(k)).item()
        assert math.log(16) <= drawn <= math.log(17) + 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("offsets", [(1,), (2, 4), (1, 2, 3, 4)])
def test_equals_slow_reference(offsets, reduction):
    predictions, targets = _inputs(offsets=offsets)
    expected = _reference(predictions, targets, 0.3, reduction)
    options = {"scale": 0.3, "reduction": reduction}
    assert cpc_loss(predictions, targets, **options).item() == pytest.approx(expected, rel=1e-12)
    single = cpc_loss({k: p.float() for k, p in predictions.items()}, targets.float(), **options)
    assert single.item() == pytest.approx(expected, rel=1e-5) and single.dtype == torch.float32


def test_offsets_that_do_not_overlap():
    assert non_overlapping_offsets(6, 80, 36) == [3, 4, 5], "CPC v2"
    assert non_overlapping_offsets(7, 64, 32) == [2, 3, 4, 5, 6], "CPC v1"
    assert non_overlapping_offsets(5, 10, 5) == [2, 3, 4], "CIFAR"
    assert non_overlapping_offsets(9, 4, 4) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="3 x 3 patches of 10 pixels at a distance of 2 overlap at every offset"):
        non_overlapping_offsets(3, 10, 2)


# --- properties -----------------------------------------------------------------------------------------------------


def test_the_order_of_images_does_not_matter_but_their_pairing_does():
    predictions, targets = _inputs()
    loss = cpc_loss(predictions, targets).item()
    order = torch.tensor([2, 0, 1])
    moved = {k: p[order] for k, p in predictions.items()}
    assert cpc_loss(moved, targets[order]).item() == pytest.approx(loss, rel=1e-13)
    assert cpc_loss(moved, targets).item() != pytest.approx(loss, rel=1e-4)


def test_the_loss_is_that_of_the_rotated_grid_with_the_same_predictions():
    """Mirrored columns are another grid with the same scores; mirrored rows are not, since the offsets go down."""
    predictions, targets = _inputs()
    loss = cpc_loss(predictions, targets).item()
    mirrored = {k: p.flip(3) for k, p in predictions.items()}
    assert cpc_loss(mirrored, targets.flip(3)).item() == pytest.approx(loss, rel=1e-13)
    upside_down = {k: p.flip(2) for k, p in predictions.items()}
    assert cpc_loss(upside_down, targets.flip(2)).item() != pytest.approx(loss, rel=1e-4)


# --- drawn negatives ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_drawn_negatives_are_the_same_for_all_predictions():
    predictions, targets = _inputs()
    leaves = [targets.requires_grad_(), *(p.requires_grad_() for p in predictions.values())]
    generator = torch.Generator().manual_seed(3)
    loss = cpc_loss(predictions, targets, negatives=6, generator=generator)
    chosen = torch.randperm(75, generator=generator.manual_seed(3))[:6]
    assert loss.item() == pytest.approx(_reference(predictions, targets, chosen=chosen), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda y, *p: cpc_loss(
            dict(zip(predictions, p, strict=True)), y, negatives=6, generator=torch.Generator().manual_seed(3)
        ),
        leaves,
    )


def test_more_negatives_make_the_task_harder():
    predictions, targets = _inputs()
    every = cpc_loss(predictions, targets).item()
    assert cpc_loss(predictions, targets, negatives=75).item() == pytest.approx(every, rel=1e-12)
    assert cpc_loss(predictions, targets, negatives=1000).item() == pytest.approx(every, rel=1e-12)
    drawn = [
        cpc_loss(predictions, targets, negatives=10, generator=torch.Generator().manual_seed(seed)).item()
        for seed in range(30)
    ]
    assert np.mean(drawn) < every


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", [linalg.CPU_SCORES, 1])
def test_gradient_is_that_of_autograd(scores, monkeypatch):
    """The loss is computed in one block of rows, and in blocks of 16 rows."""
    monkeypatch.setattr(linalg, "CPU_SCORES", scores)
    predictions, targets = _inputs()
    leaves = [targets.requires_grad_(), *(p.requires_grad_() for p in predictions.values())]
    found = torch.autograd.grad(3 * cpc_loss(predictions, targets), leaves)
    expected = torch.autograd.grad(3 * _plain(predictions, targets), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-15)
    with torch.no_grad():
        assert not cpc_loss(predictions, targets).requires_grad
    frozen = {k: p.detach() for k, p in predictions.items()}
    assert cpc_loss(frozen, targets).requires_grad, "of the targets alone"


@pytest.mark.parametrize("device", devices())
def test_degenerate_batches_are_finite(device):
    for scale in (0.0, 1e-4, 1.0, 1e3):
        for batch in (1, 4):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                predictions, targets = _inputs(1)
                one = {k: (scale * p).expand(batch, *p.shape[1:]) for k, p in predictions.items()}
                free = {k: p.to(device, dtype).float().requires_grad_() for k, p in one.items()}
                y = (scale * targets).expand(batch, *targets.shape[1:]).to(device, dtype).float().requires_grad_()
                for negatives in ("all", 7):
                    loss = cpc_loss(free, y, negatives=negatives, generator=torch.Generator().manual_seed(0))
                    assert loss.isfinite(), (scale, batch, dtype)
                    gradients = torch.autograd.grad(loss, [y, *free.values()])
                    assert all(gradient.isfinite().all() for gradient in gradients), (scale, batch, dtype)


def test_autocast_and_compile():
    predictions, targets = _inputs()
    predictions, targets = {k: p.float() for k, p in predictions.items()}, targets.float()
    plain = cpc_loss(predictions, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cpc_loss(predictions, targets), plain)
    compiled = torch.compile(cpc_loss, fullgraph=True, backend="eager")
    assert compiled(predictions, targets).item() == pytest.approx(plain.item(), rel=1e-6)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_input():
    predictions, targets = _inputs()
    for bad, sentence in (
        (({}, targets), "predictions are missing: give those of at least one offset"),
        ((predictions, targets[:, :, 1:]), r"targets must be \[B, T, G, G\], got \(3, 4, 4, 5\)"),
        (({3: predictions[2]}, targets), r"with 0 < k < G = 5, got \(3, 4, 3, 5\) for k = 3"),
        (({5: predictions[4]}, targets), r"got \(3, 4, 1, 5\) for k = 5"),
        ((predictions, targets * torch.nan), "targets"),
        (({2: predictions[2] / 0}, targets), r"predictions\[2\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cpc_loss(*bad)
    with pytest.raises(ValueError, match="the CPC loss needs at least 1 rows over all processes, got 0"):
        cpc_loss({k: p[:0] for k, p in predictions.items()}, targets[:0])
    several = SimpleNamespace(size=2, rank=0)
    with pytest.raises(ValueError, match="drawn negatives need a generator with the same seed on all processes"):
        cpc_loss(predictions, targets, negatives=3, comm=several)
    for options, sentence in (
        ({"scale": 0.0}, "scale must be"),
        ({"negatives": "some"}, "negatives must be one of all, got 'some'"),
        ({"negatives": 0}, "negatives must be"),
        ({"reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cpc_loss(predictions, targets, **options)


# --- several processes ----------------------------------------------------------------------------------------------


def _loss(drawn, comm, model, targets, *predictions):
    """The maps pass the model, channels last."""
    maps = [model(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for x in (targets, *predictions)]
    offsets = {maps[0].shape[2] - each.shape[2]: each for each in maps[1:]}
    options = {"negatives": 9, "generator": torch.Generator().manual_seed(1)} if drawn else {}
    return cpc_loss(offsets, maps[0], scale=0.5, comm=comm, **options)


@pytest.mark.ddp
@pytest.mark.parametrize("counts", [(2, 3), (3, 1, 2), (5, 0, 1)], ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_processes_with_unequal_rows_are_the_joined_batch(ranks, counts, drawn):
    predictions, targets = _inputs(sum(counts))
    inputs = [targets, *predictions.values()]
    assert_joined(ranks, partial(_loss, drawn), inputs, counts, build=partial(toy_mlp, 4))


# --- several directions, and the module ------------------------------------------------------------------------------


def test_terms_are_the_mean_over_directions_and_the_information():
    pairs = [_inputs(seed=seed) for seed in range(4)]
    expected = np.mean([_reference(*pair) for pair in pairs])
    terms = cpc_terms(pairs)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-12)
    assert terms.information.item() == pytest.approx(math.log(3 * 25) - expected, rel=1e-12)
    summed = cpc_terms(pairs, reduction="sum")
    assert summed.loss.item() == pytest.approx(2 * expected, rel=1e-12)
    assert summed.information.item() == pytest.approx(terms.information.item(), rel=1e-12)


def test_the_module_draws_by_seed_and_step():
    predictions, targets = _inputs()
    losses = {seed: CPCLoss(negatives=4, seed=seed) for seed in (0, 1)}
    first = [losses[0](predictions, targets).item() for _ in range(3)]
    assert len({*first}) == 3 and losses[1](predictions, targets).item() != first[0]
    resumed = CPCLoss(negatives=4)
    state = losses[0].state_dict()
    state["clock.steps"] = torch.tensor(1)
    resumed.load_state_dict(state)
    assert [resumed(predictions, targets).item() for _ in range(2)] == first[1:]
    whole = CPCLoss()
    assert not whole.state_dict()
    assert whole(predictions, targets).item() == pytest.approx(_reference(predictions, targets), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: cpc_terms([]), "directions must have at least one entry"),
        (lambda: CPCLoss(scale=0.0), "scale must be in"),
        (lambda: CPCLoss(negatives=0), "negatives must be in [1, inf)"),
        (lambda: CPCLoss(reduction="none"), "reduction must be one of mean, sum"),
        (lambda: CPCLoss(seed=-1), "seed must be in [0, inf)"),
    ],
)
def test_mistakes_in_the_module_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)
