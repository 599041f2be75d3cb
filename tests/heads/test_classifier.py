"""The classifier of linear evaluations: output and initialisation."""

import numpy as np
import pytest
import torch

from plugins.heads import normalized_classifier


def test_standardizes_the_features_and_nothing_else():
    """Reference in float64: (h - mean) / sqrt(var + 1e-6), the variance of the batch with divisor B."""
    torch.manual_seed(0)
    head = normalized_classifier(5, 3).double()
    h = 7 + 100 * torch.randn(16, 5, dtype=torch.float64)
    x = h.numpy()
    unit = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    expected = unit @ head[1].weight.detach().numpy().T
    np.testing.assert_allclose(head(h).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_learns_the_linear_layer_alone():
    head = normalized_classifier(2048, 1000)
    assert [name for name, _ in head.named_parameters()] == ["1.weight", "1.bias"]
    assert head[1].bias.abs().max() == 0
    assert head[1].weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_the_scale_of_the_features_does_not_matter():
    torch.manual_seed(0)
    head, h = normalized_classifier(4, 2), torch.randn(8, 4)
    torch.testing.assert_close(head(h), head(1000 * h + 5), rtol=1e-3, atol=1e-5)


def test_widths_below_one_are_refused():
    with pytest.raises(ValueError, match="classes must be in"):
        normalized_classifier(4, 0)
