"""The error of each precondition names the expected and the given value."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from plugins.checks import (
    NotFiniteError,
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
from plugins.distributed import LOCAL
from plugins.losses import byol_loss, cissl_loss, ssl_ey_loss


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
    with pytest.raises(ValueError, match="a logarithm needs finite numbers, got NaN or inf in z1, p0; lower "):
        check_finite("a logarithm", z0=good, z1=bad, p0=bad / bad)


def test_a_result_that_is_not_finite_names_its_cause():
    good, bad = torch.ones(2, 2), torch.tensor([[1.0, torch.inf]])
    check_result("a mean", good.mean(), LOCAL, good=good, bad=bad)  # not looked at
    with pytest.raises(FloatingPointError, match=r"^a mean needs finite numbers, got NaN or inf in bad; lower the"):
        check_result("a mean", bad.mean(), LOCAL, good=good, bad=bad)
    check_result("a sum", good.sum() * torch.inf, LOCAL, good=good)  # an overflow
    check_result("a sum", torch.empty((), device="meta"), LOCAL, bad=bad)


def _result_of_rank(comm, tensor):
    result = comm.sum(tensor.sum())
    try:
        check_result("a sum", result, comm, good=torch.ones(2), given=tensor)
    except NotFiniteError as error:
        return str(error).partition(";")[0]
    return "finite" if result.isfinite() else "overflow"


@pytest.mark.ddp
def test_every_process_names_the_tensor_of_the_one_that_is_not_finite(ranks):
    good, bad, large = torch.ones(3), torch.tensor([1.0, torch.nan]), torch.full((2,), 3e38)
    message = "a sum needs finite numbers, got NaN or inf in given"
    assert ranks.run(_result_of_rank, [(good,), (bad,)]) == [f"{message} of another process", message]
    assert ranks.run(_result_of_rank, [(bad,), (good,)]) == [message, f"{message} of another process"]
    assert ranks.run(_result_of_rank, [(good,), (good,)]) == ["finite"] * 2
    assert ranks.run(_result_of_rank, [(large,), (large,)]) == ["overflow"] * 2, "not blamed on another process"


@pytest.mark.parametrize("loss", [byol_loss, ssl_ey_loss, lambda a, b: cissl_loss([a, b], [a, b])])
def test_losses_can_be_traced_without_values(loss):
    with FakeTensorMode():
        assert loss(torch.randn(6, 4), torch.randn(6, 4)).shape == ()


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
        with pytest.raises(ValueError, match=f"order must be an integer, got {value!r}"):
            check_whole("order", value, low=1)
    with pytest.raises(ValueError, match=r"order must be in \[1, inf\), got 0"):
        check_whole("order", 0, low=1)


def test_compute_dtype():
    given = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [compute_dtype(dtype) for dtype in given] == [torch.float32] * 3 + [torch.float64]
