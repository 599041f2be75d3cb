"""Every precondition says what was expected and what was given."""

import pytest
import torch

from plugins.checks import (
    check_choice,
    check_count,
    check_finite,
    check_range,
    check_result,
    check_rows,
    check_views,
    check_whole,
    compute_dtype,
)


def test_rows_accept_matrices_of_one_shape():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        check_rows(a=torch.zeros(2, 3, dtype=dtype), b=torch.zeros(2, 3))
    check_rows(a=torch.zeros(0, 3))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"a must be a matrix \[N, D\], got shape \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3, 1), r"b must be a matrix \[N, D\], got shape \(2, 3, 1\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"b must have the shape of a, \(2, 3\), got \(2, 4\)"),
        (torch.zeros(2, 3), torch.zeros(2, 3).long(), "b must be of a floating-point dtype, got torch.int64"),
        (torch.zeros(2, 3).bool(), torch.zeros(2, 3), "a must be of a floating-point dtype, got torch.bool"),
        ([torch.zeros(2, 3)], torch.zeros(2, 3), r"a must be one matrix \[N, D\], got a list"),
    ],
)
def test_rows_refuse_anything_else(a, b, message):
    with pytest.raises(ValueError, match=message):
        check_rows(a=a, b=b)


def test_views_accept_lists_of_matrices_and_stacked_views():
    check_views(teacher=[torch.zeros(2, 3)], student=(torch.zeros(2, 3), torch.zeros(2, 3)))
    check_views(teacher=torch.zeros(2, 2, 3), student=[torch.zeros(2, 3)] * 2)
    check_views(teacher=[], student=[])  # their numbers are checked by the losses


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (torch.zeros(2, 3), r"teacher is one tensor of shape \(2, 3\); pass a list of views, such as \[t0, t1\]"),
        (torch.zeros(3), r"pass a list of views, such as \[t0, t1\]"),
        ([torch.zeros(2, 4)], r"student\[0\] must have the shape of teacher\[0\], \(2, 4\), got \(2, 3\)"),
    ],
)
def test_views_refuse_anything_else(teacher, message):
    with pytest.raises(ValueError, match=message):
        check_views(teacher=teacher, student=[torch.zeros(2, 3)])


def test_finite():
    good, bad = torch.ones(2, 3), torch.tensor([[1.0, float("inf")]])
    check_finite("a logarithm", z0=good, z1=good)
    with pytest.raises(ValueError, match="a logarithm needs finite numbers, got NaN or inf in z1, p0"):
        check_finite("a logarithm", z0=good, z1=bad, p0=bad / bad)


def test_a_result_that_is_not_finite_names_its_cause():
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, torch.inf]])
    check_result("a mean", good.mean(), 1, good=good, bad=bad)  # not looked at
    with pytest.raises(FloatingPointError, match=r"^a mean needs finite numbers, got NaN or inf in bad$"):
        check_result("a mean", bad.mean(), 2, good=good, bad=bad)
    check_result("a sum", good.sum() * torch.inf, 1, good=good)  # an overflow
    with pytest.raises(ValueError, match=r"^a sum is NaN or inf because of the rows of another process$"):
        check_result("a sum", good.sum() * torch.inf, 2, good=good)
    check_result("a sum", torch.empty((), device="meta"), 1, bad=bad)


def test_count():
    check_count(2, least=2, what="a variance")
    with pytest.raises(ValueError, match="a variance needs at least 2 rows over all processes, got 1"):
        check_count(1, least=2, what="a variance")


def test_choice():
    check_choice("form", "gram", ("auto", "gram"))
    with pytest.raises(ValueError, match="form must be one of auto, gram, got 'dual'"):
        check_choice("form", "dual", ("auto", "gram"))


def test_range():
    check_range("rho", 0.0, low=0, high=1)
    check_range("rho", 1.0, low=0, high=1)
    check_range("eps", 1e9, low=0)
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rho must be in \[0, 1\], got"):
            check_range("rho", value, low=0, high=1)
    for word in ("a", "1", None, [1]):
        with pytest.raises(ValueError, match="rho must be a number, got"):
            check_range("rho", word, low=0, high=1)


def test_whole():
    check_whole("order", 1, low=1)
    for value in (4.0, 1.5, float("inf"), float("nan"), "1", True, None):
        with pytest.raises(ValueError, match=f"order must be a whole number, got {value!r}"):
            check_whole("order", value, low=1)
    with pytest.raises(ValueError, match=r"order must be in \[1, inf\), got 0"):
        check_whole("order", 0, low=1)


def test_compute_dtype():
    given = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [compute_dtype(dtype) for dtype in given] == [torch.float32] * 3 + [torch.float64]
