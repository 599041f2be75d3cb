"""The learned predictor: its layers, its state-dict keys, one prediction per view."""

import pytest
import torch
from torch import nn

from plugins.predictors import MLPPredictor


def test_is_the_plain_sequence_it_replaces():
    """Loads the state of Linear, BatchNorm, ReLU, Linear and predicts the same."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 6))
    predictor = MLPPredictor(6, 10)
    assert predictor.load_state_dict(plain.state_dict(), strict=True)
    z = torch.randn(8, 6)
    assert torch.equal(predictor(z), plain(z))


def test_bias_is_that_of_the_first_layer():
    predictor = MLPPredictor(6, 10, bias=False)
    assert predictor[0].bias is None
    assert predictor[3].bias is not None


@pytest.mark.parametrize("widths", [(0, 4), (4, 0)])
def test_rejects_no_width(widths):
    with pytest.raises(ValueError, match="dim must be in"):
        MLPPredictor(*widths)


def test_predicts_view_by_view():
    """Each view is normalised with its own statistics, and rows may differ in number."""
    torch.manual_seed(0)
    predictor = MLPPredictor(4, 8)
    views = [torch.randn(8, 4), 5 + torch.randn(6, 4)]
    predictions = predictor.predict(views)
    assert [p.shape for p in predictions] == [(8, 4), (6, 4)]
    for z, p in zip(views, predictions, strict=True):
        assert torch.equal(p, predictor(z))
    torch.cat(predictions).sum().backward()
    assert all(parameter.grad is not None for parameter in predictor.parameters())
