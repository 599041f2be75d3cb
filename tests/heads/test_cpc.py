"""CPC's contexts and head: causality by gradient, slow references, directions, the two forms of the score, mistakes."""

import numpy as np
import pytest
import torch

from plugins.heads import CPCHead, GatedContext, GRUContext, PixelCNNContext
from plugins.heads.context import CONTEXTS, context_network
from plugins.heads.cpc import turned

ROWS = {"pixelcnn": 6, "gated": 5, "gru": 7}
"""Rows that a row of the context depends on, on a grid of seven rows: the own one and those above."""
COLUMNS = {"pixelcnn": 5, "gated": 4, "gru": 0}
"""Columns to either side that it depends on."""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _seen(network, side, width=3):
    """Whether location (i, j) of the context depends on location (k, l) of the grid: [side, side, side, side]."""
    grid = torch.randn(2, width, side, side, dtype=torch.float64, requires_grad=True)
    context = network.double()(grid)
    found = np.zeros((side,) * 4, dtype=bool)
    for i in range(side):
        for j in range(side):
            (gradient,) = torch.autograd.grad(context[0, :, i, j].square().sum(), grid, retain_graph=True)
            assert not gradient[1].any(), "another image"
            found[i, j] = gradient[0].abs().sum(0).numpy() > 0
    return found


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_depends_on_no_row_below_and_on_all_rows_in_its_reach(name):
    side = 7
    network = context_network(name, 3, 16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    seen = _seen(network, side)
    rows = seen.any((1, 3))
    expected = [[0 <= i - k < ROWS[name] for k in range(side)] for i in range(side)]
    assert rows.tolist() == expected
    columns = seen.any((0, 2))
    assert columns.tolist() == [[abs(j - m) <= COLUMNS[name] for m in range(side)] for j in range(side)]


def test_the_border_columns_of_the_pixelcnn_see_their_neighbours():
    """A 1 x 3 convolution without padding would make the branch at both borders a constant."""
    network = PixelCNNContext(3, 16).double()
    grid = torch.randn(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    for column in (0, 5):
        (gradient,) = torch.autograd.grad(network.blocks[0](grid)[0, :, 3, column].sum(), grid)
        assert gradient[0, :, :, column].any() and gradient[0, :, :, abs(column - 1)].any()


def _conv(layer, grid, offsets):
    """A convolution one location at a time; ``offsets`` are the rows and columns of the kernel's taps."""
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    _, rows, columns = grid.shape
    out = np.zeros((len(weight), rows, columns)) + bias[:, None, None]
    for i in range(rows):
        for j in range(columns):
            for number, down in enumerate(offsets[0]):
                for place, right in enumerate(offsets[1]):
                    if 0 <= i + down < rows and 0 <= j + right < columns:
                        out[:, i, j] += weight[:, :, number, place] @ grid[:, i + down, j + right]
    return out


def _relu(x):
    return np.maximum(x, 0)


def _reference_pixelcnn(network, grid):
    for block in network.blocks:
        first, _, wide, _, down, _, last = block
        branch = _relu(_conv(first, grid, ([0], [0])))
        branch = _conv(wide, branch, ([0], [-1, 0, 1]))
        branch = _relu(_conv(down, branch, ([-1, 0], [0])))
        grid = grid + _conv(last, branch, ([0], [0]))
    return _relu(grid)


def _gate(maps):
    half = len(maps) // 2
    return np.tanh(maps[:half]) / (1 + np.exp(-maps[half:]))


def _reference_gated(network, grid):
    vertical = horizontal = grid
    for layer in network.layers:
        seen = _conv(layer.vertical, vertical, ([-1, 0], [-1, 0, 1]))
        own = _conv(layer.horizontal, horizontal, ([0], [-1, 0, 1])) + _conv(layer.across, seen, ([0], [0]))
        vertical, horizontal = _gate(seen), horizontal + _conv(layer.out, _gate(own), ([0], [0]))
    return horizontal


def _reference_gru(network, grid):
    gru = {name: value.detach().numpy() for name, value in network.gru.named_parameters()}
    width, rows, columns = grid.shape
    out = np.zeros_like(grid)
    for j in range(columns):
        state = np.zeros(width)
        for i in range(rows):
            of_input = np.split(gru["weight_ih_l0"] @ grid[:, i, j] + gru["bias_ih_l0"], 3)
            of_state = np.split(gru["weight_hh_l0"] @ state + gru["bias_hh_l0"], 3)
            reset, keep = (1 / (1 + np.exp(-of_input[k] - of_state[k])) for k in (0, 1))
            state = (1 - keep) * np.tanh(of_input[2] + reset * of_state[2]) + keep * state
            out[:, i, j] = state
    return out


REFERENCES = {
    "pixelcnn": (PixelCNNContext(3, 5), _reference_pixelcnn),
    "gated": (GatedContext(3), _reference_gated),
    "gru": (GRUContext(3), _reference_gru),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_contexts_equal_the_slow_reference(name):
    network, reference = REFERENCES[name]
    network.double()
    grids = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = [reference(network, grid) for grid in grids.numpy()]
    np.testing.assert_allclose(network(grids).detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_four_turns_restore_the_grid():
    z = torch.randn(2, 3, 5, 5)
    assert torch.equal(turned(z, 4), z) and torch.equal(turned(turned(z, 1), 3), z)
    assert torch.equal(turned(z, 1), torch.rot90(z, -1, (2, 3)))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("directions", [1, 2, 4])
def test_a_direction_of_the_head_is_the_first_one_on_the_turned_grid(directions, context):
    head = CPCHead(3, 4, grid=4, offsets=[2, 3], hidden=8, directions=directions, context=context).double()
    for of_direction in head.predictions[1:]:
        of_direction.load_state_dict(head.predictions[0].state_dict())
    features = torch.randn(2, 16, 3, dtype=torch.float64)
    targets, *predictions = head.project_stack(features)
    assert [tuple(p.shape) for p in predictions] == [(2, directions, 4, 2, 4), (2, directions, 4, 1, 4)]
    for direction in range(directions):
        turns = direction * (4 // max(directions, 2))
        z = turned(features.transpose(1, 2).view(2, 3, 4, 4), turns)
        alone, *theirs = head.project_stack(z.flatten(2).transpose(1, 2))
        torch.testing.assert_close(targets[:, direction], alone[:, 0], rtol=1e-12, atol=1e-12)
        for ours, other in zip(predictions, theirs, strict=True):
            torch.testing.assert_close(ours[:, direction], other[:, 0], rtol=1e-12, atol=1e-12)


def test_predictions_and_targets_one_location_at_a_time():
    head = CPCHead(3, 4, grid=4, offsets=[1, 3], hidden=8).double()
    features = torch.randn(2, 16, 3, dtype=torch.float64)
    targets, *predictions = (part.detach().numpy() for part in head.project_stack(features))
    for b, patches in enumerate(features.numpy()):
        grid = patches.reshape(4, 4, 3).transpose(2, 0, 1)
        context = _reference_pixelcnn(head.context, grid)
        for i in range(4):
            for j in range(4):
                y = head.target.weight.detach().numpy() @ grid[:, i, j] + head.target.bias.detach().numpy()
                np.testing.assert_allclose(targets[b, 0, :, i, j], y, rtol=1e-10, atol=1e-12)
                for place, k in enumerate([1, 3]):
                    if i >= 4 - k:
                        continue
                    layer = head.predictions[0][place]
                    p = layer.weight.detach().numpy() @ context[:, i, j] + layer.bias.detach().numpy()
                    np.testing.assert_allclose(predictions[place][b, 0, :, i, j], p, rtol=1e-10, atol=1e-12)


def test_the_bilinear_score_has_one_matrix_per_offset():
    head = CPCHead(3, None, grid=3, offsets=[1, 2], context="gru")
    features = torch.randn(2, 9, 3)
    targets, *predictions = head.project_stack(features)
    assert torch.equal(targets[:, 0].flatten(2).transpose(1, 2), features)
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters() if not name.startswith("context")}
    assert shapes == {"predictions.0.0.weight": (3, 3), "predictions.0.1.weight": (3, 3)}
    context = head.context(targets[:, 0])
    w = head.predictions[0][1].weight
    torch.testing.assert_close(predictions[1][:, 0, :, 0], torch.einsum("dc,bcj->bdj", w, context[:, :, 0]))


def test_the_embedding_is_that_of_the_mean_patch():
    head, features = CPCHead(3, 4, grid=3, offsets=[2]), torch.randn(2, 9, 3)
    targets = head.project_stack(features)[0]
    torch.testing.assert_close(head(features), targets[:, 0].mean((2, 3)))
    torch.testing.assert_close(head(features), head(features.mean(1)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: CPCHead(3, 4, grid=4, offsets=[2])(torch.ones(2, 9, 3)), "[B, 16, 3] of stacks of 4 x 4 patches, got"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[2]).project_stack(torch.ones(2, 3)), "got shape (2, 3)"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[4]), "offsets must be distinct integers from 1 to grid - 1 = 3"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[]), "got []"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[2, 2]), "must be distinct"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[2], directions=3), "directions must be one of 1, 2, 4, got 3"),
        (lambda: CPCHead(3, 4, grid=4, offsets=[2], context="lstm"), "pixelcnn, gated, gru, got 'lstm'"),
        (lambda: CPCHead(0, 4, grid=4, offsets=[2]), "features_dim must be in [1, inf)"),
        (lambda: PixelCNNContext(3, 0), "hidden must be in [1, inf)"),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)
