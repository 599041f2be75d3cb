"""SwAV's prototypes: unit rows before every forward pass of training, the gradient of the cosines, evaluation."""

import pytest
import torch
import torch.nn.functional as F

from plugins.predictors import Prototypes


@pytest.fixture
def prototypes():
    torch.manual_seed(0)
    return Prototypes(4, 5).double()


def _rows(count=3):
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64), dim=1)


def test_training_normalises_the_parameter_in_place_and_scores_are_cosines(prototypes):
    weight, before = prototypes.weight, prototypes.weight.detach().clone()
    views = [_rows(), 2 * _rows(2)]
    scores = prototypes.predict(views)
    assert prototypes.weight is weight
    torch.testing.assert_close(weight.detach(), F.normalize(before, dim=1))
    for score, view in zip(scores, views, strict=True):
        torch.testing.assert_close(score, F.normalize(view, dim=1) @ F.normalize(before, dim=1).T)


def test_gradient_does_not_pass_the_normalisation(prototypes):
    rows = _rows().requires_grad_()
    (scores,) = prototypes.predict([rows])
    of_rows, of_weight = torch.autograd.grad(scores.square().sum() / 2, [rows, prototypes.weight])
    torch.testing.assert_close(of_weight, scores.T @ rows)  # not orthogonal to the prototypes
    along = scores @ prototypes.weight
    torch.testing.assert_close(of_rows, along - (along * rows).sum(1, keepdim=True) * rows)  # a unit row only turns


def test_two_passes_before_one_backward(prototypes):
    """The second normalisation is in place, too: backward needs the weights of the first pass."""
    first, second = prototypes.predict([_rows()])[0], prototypes.predict([_rows()])[0]
    (first.sum() + second.sum()).backward()
    assert prototypes.weight.grad is not None


def test_evaluation_scores_with_unit_rows_and_changes_nothing(prototypes):
    with torch.no_grad():
        prototypes.weight.mul_(3)
    before = prototypes.weight.detach().clone()
    scores = prototypes.eval().predict([_rows()])[0]
    assert torch.equal(prototypes.weight, before)
    torch.testing.assert_close(scores, _rows() @ F.normalize(before, dim=1).T)


def test_scores_are_float32_under_autocast():
    torch.manual_seed(0)
    prototypes, rows = Prototypes(4, 5), _rows().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (scores,) = prototypes.predict([rows])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, F.normalize(rows.float(), dim=1) @ prototypes.weight.T)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
def test_widths_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=r"must be in \[1, inf\), got 0"):
        Prototypes(*sizes)
