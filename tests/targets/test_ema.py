"""The exponential-moving-average teacher and its schedule."""

import copy
import itertools

import pytest
import torch
from torch import nn

from plugins.targets import EMATeacher, cosine_tau, needs_teacher


def encoder():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def disturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Schedule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [0.99, 0.996])
@pytest.mark.parametrize(("step", "way"), [(0, 0), (250, 0.1464466094), (500, 0.5), (1000, 1)])
def test_schedule_is_half_a_cosine(base, step, way):
    assert cosine_tau(step, 1000, base, 1.0) == pytest.approx(base + (1 - base) * way, abs=1e-11)


def test_schedule_of_the_slow_teacher():
    """1 - 0.004 (1 + cos(pi t / T)) / 2 over 100 epochs of 1251 steps."""
    total = 125100
    assert cosine_tau(0, total, 0.996, 1.0) == 0.996
    assert cosine_tau(total // 4, total, 0.996, 1.0) == pytest.approx(1 - 0.004 * 0.8535533905932737, abs=1e-12)
    assert 0 < 1 - cosine_tau(total - 1, total, 0.996, 1.0) < 1e-12


def test_schedule_without_teacher_is_zero():
    assert [cosine_tau(step, 10, 0.0, 0.0) for step in range(11)] == [0.0] * 11


def test_schedule_rises_and_stays_at_its_end():
    taus = [cosine_tau(step, 50, 0.9, 1.0) for step in range(60)]
    assert taus[0] == 0.9
    assert all(low < high for low, high in itertools.pairwise(taus[:51]))
    assert taus[50:] == [1.0] * 10


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1, 10, 0.9, 1.0), "step"), ((0, 0, 0.9, 1.0), "total"), ((0, 9, -0.1, 1), "base"), ((0, 9, 0.9, 1.1), "final")],
)
def test_schedule_rejects_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        cosine_tau(*arguments)


def test_teacher_is_needed_unless_tau_is_zero():
    assert needs_teacher(0.99, 1.0)
    assert needs_teacher(0.0, 1.0)
    assert needs_teacher(0.5, 0.0)
    assert not needs_teacher(0.0, 0.0)


# Teacher --------------------------------------------------------------------------------------------------------------


def test_update_is_the_formula():
    student = encoder()
    teacher = EMATeacher(student, base=0.9, final=1.0)
    before = [p.clone() for p in teacher.module.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, student.parameters(), strict=True))
    disturb(student)
    for step in (0, 1):
        tau = teacher.update(step, 10)
        assert tau == cosine_tau(step, 10, 0.9, 1.0)
        before = [tau * old + (1 - tau) * new for old, new in zip(before, student.parameters(), strict=True)]
        for got, wanted in zip(teacher.module.parameters(), before, strict=True):
            torch.testing.assert_close(got, wanted)


def test_tau_zero_copies_and_tau_one_keeps():
    student = encoder()
    follower, keeper = EMATeacher(student, base=0.0, final=0.0), EMATeacher(student, base=1.0, final=1.0)
    before = copy.deepcopy(student)
    disturb(student)
    follower.update(0, 10)
    keeper.update(0, 10)
    for teacher, wanted in ((follower, student), (keeper, before)):
        for p, q in zip(teacher.module.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(p, q)


def test_buffers_are_never_copied():
    """The teacher's BatchNorm uses its own batches and keeps its own running statistics."""
    student = encoder()
    parallel = encoder()
    parallel(torch.randn(32, 4))
    mean = parallel[1].running_mean.clone()
    teacher = EMATeacher(student, parallel, base=0.0, final=0.0)
    assert teacher.module is parallel
    assert torch.equal(parallel[0].weight, student[0].weight)  # starts as the student
    disturb(student)
    student(5 + torch.randn(32, 4))
    teacher.update(0, 10)
    assert torch.equal(parallel[1].running_mean, mean)
    assert torch.equal(parallel[0].weight, student[0].weight)

    x = torch.randn(32, 4)
    assert teacher.training
    assert torch.equal(teacher(x), student(x))  # equal parameters and batch statistics, unequal buffers
    assert not torch.equal(parallel[1].running_mean, student[1].running_mean)


def test_no_gradient_and_no_part_of_the_student():
    student = encoder()
    teacher = EMATeacher(student)
    assert not teacher(torch.randn(8, 4, requires_grad=True)).requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert set(teacher.state_dict()) == {f"module.{key}" for key in student.state_dict()}
    teacher.eval()
    assert student.training


def test_resumed_run_equals_uninterrupted_run():
    student = encoder()
    teacher = EMATeacher(student, base=0.5)
    snapshots = []
    for step in range(6):
        disturb(student)
        teacher.update(step, 6)
        snapshots.append((copy.deepcopy(student.state_dict()), copy.deepcopy(teacher.state_dict())))
    other = encoder()
    resumed = EMATeacher(other, base=0.5)
    resumed.load_state_dict(snapshots[2][1])
    for step in range(3, 6):
        other.load_state_dict(snapshots[step][0])
        resumed.update(step, 6)
    for key, value in teacher.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_follows_its_own_student_through_a_deep_copy():
    pair = nn.ModuleDict({"student": encoder()})
    pair["teacher"] = EMATeacher(pair["student"])
    other = copy.deepcopy(pair)
    assert other["teacher"].student is other["student"]


def test_rejects_another_architecture():
    with pytest.raises(ValueError, match="student's parameters"):
        EMATeacher(encoder(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="base"):
        EMATeacher(encoder(), base=1.5)
