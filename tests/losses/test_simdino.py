"""SimDINO: known values, slow reference, gradient, properties, processes."""

import math

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.heads import dino_mlp
from plugins.losses import SimDINOLoss, simdino_loss, simdino_terms
from plugins.methods import METHODS
from plugins.testing import assert_joined, toy_views

FORMS = ("covariance", "gram")


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _reference_simdino(student, teacher, eps=0.05, weight=1.0, expansion_of="mean"):
    student, teacher = ([_unit(view.detach().numpy()) for view in views] for views in (student, teacher))
    n, d = student[0].shape
    cosines = [
        np.mean([t[i] @ s[i] for i in range(n)]) for u, t in enumerate(teacher) for v, s in enumerate(student) if u != v
    ]
    rates = []
    for s, t in zip(student, teacher, strict=False):
        spread = s if expansion_of == "student" else (s + t) / 2
        moment = sum(np.outer(row, row) for row in spread) / n
        rates.append(np.log(np.linalg.eigvalsh(np.eye(d) + d / eps * moment)).sum() / 2)
    return -weight * np.mean(cosines) - (d + n) / (d * n) * np.mean(rates)


def _views(rows=7, width=5, views=(2, 2), seed=0):
    drawn = toy_views(rows, width, views=sum(views), seed=seed)
    return drawn[: views[0]], drawn[views[0] :]


@pytest.mark.parametrize("form", FORMS)
def test_known_values(form):
    options = {"eps": 0.5, "form": form}
    same = [torch.full((6, 4), 3.0, dtype=torch.float64)] * 2
    terms = simdino_terms(same, same, **options)  # collapsed: one eigenvalue, 1 + D / eps
    assert terms.similarity.item() == pytest.approx(1)
    assert terms.expansion.item() == pytest.approx(10 / 24 * math.log(1 + 4 / 0.5) / 2)
    axes = [torch.eye(4, dtype=torch.float64).repeat(3, 1)] * 2  # each axis three times: isotropic
    assert simdino_terms(axes, axes, **options).expansion.item() == pytest.approx(16 / 48 * 2 * math.log(1 + 1 / 0.5))
    few = [torch.eye(2, 4, dtype=torch.float64)] * 2
    assert simdino_terms(few, few, **options).expansion.item() == pytest.approx(6 / 8 * math.log(1 + 4 / (2 * 0.5)))
    opposite = simdino_terms(axes, [-view for view in axes], **options)  # the means are zero
    assert (opposite.similarity.item(), opposite.expansion.item(), opposite.loss.item()) == pytest.approx((-1, 0, 1))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("expansion_of", ["mean", "student"])
@pytest.mark.parametrize(("rows", "views"), [(7, (2, 2)), (3, (4, 2)), (7, (3, 1)), (1, (2, 2))])
def test_value_and_gradient_are_those_of_the_formula(form, expansion_of, rows, views):
    student, teacher = _views(rows, views=views)
    options = {"eps": 0.3, "expansion_of": expansion_of}
    expected = _reference_simdino(student, teacher, weight=0.7, **options)
    options |= {"similarity_weight": 0.7, "form": form}
    assert simdino_loss(student, teacher, **options).item() == pytest.approx(expected, rel=1e-12)
    single = [[view.float() for view in views] for views in (student, teacher)]
    assert simdino_loss(*single, **options).item() == pytest.approx(expected, rel=1e-5)
    free = [view.requires_grad_() for view in student]
    assert torch.autograd.gradcheck(lambda *s: simdino_loss(s, teacher, **options), free)


def test_does_not_depend_on_rotation_order_and_length():
    student, teacher = _views(views=(3, 2))
    value = simdino_loss(student, teacher).item()
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    lengths = torch.linspace(0.1, 90, 7, dtype=torch.float64).unsqueeze(1)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    for change in (lambda z: z @ rotation, lambda z: z[order], lambda z: z * lengths):
        changed = [[change(view) for view in views] for views in (student, teacher)]
        assert simdino_loss(*changed).item() == pytest.approx(value, rel=1e-10)
    student[2] = student[2] @ rotation
    assert simdino_loss(student, teacher).item() != pytest.approx(value, rel=1e-3)


def test_small_crops_change_the_similarity_only():
    student, teacher = _views(views=(3, 2))
    whole, large = simdino_terms(student, teacher), simdino_terms(student[:2], teacher)
    assert whole.expansion.item() == pytest.approx(large.expansion.item(), rel=1e-12)
    assert whole.similarity.item() != pytest.approx(large.similarity.item(), rel=1e-3)


def test_teacher_has_no_gradient_and_loss_has_no_second_one():
    student, teacher = ([view.requires_grad_() for view in views] for views in _views())
    terms = simdino_terms(student, teacher)
    assert not terms.similarity.requires_grad and not terms.expansion.requires_grad
    assert torch.autograd.grad(terms.loss, teacher, allow_unused=True) == (None, None)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(simdino_loss(student, teacher), student, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_smallest_eps_leaves_a_collapsed_batch_finite_in_float32(form):
    rows = torch.full((300, 256), 0.7)
    rows[1:] += 1e-3 * torch.randn(299, 256, generator=torch.Generator().manual_seed(0))
    views = [rows.requires_grad_(), rows.detach()]
    found = simdino_loss(views, views, eps=256 * 1e-5, form=form)
    exact = simdino_loss([view.double() for view in views], [view.double() for view in views], eps=256 * 1e-5)
    assert found.item() == pytest.approx(exact.item(), rel=2e-3)
    (gradient,) = torch.autograd.grad(found, rows)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps": 1e-6}, "eps must be in"),
        ({"similarity_weight": -1.0}, "similarity_weight must be in"),
        ({"expansion_of": "teacher"}, "expansion_of must be one of mean, student, got 'teacher'"),
        ({"form": "qr"}, "form must be one of auto, covariance, gram"),
    ],
)
def test_arguments_out_of_range_are_errors(given, message):
    with pytest.raises(ValueError, match=message):
        simdino_loss(*_views(), **given)


@pytest.mark.parametrize(("views", "message"), [((1, 1), "got 1 and 1"), ((2, 3), "got 2 and 3"), ((2, 0), "2 and 0")])
def test_numbers_of_views_that_do_not_fit_are_errors(views, message):
    with pytest.raises(ValueError, match=message):
        simdino_loss(*_views(views=views))
    with pytest.raises(ValueError, match="needs at least 1 rows"):
        simdino_loss([torch.zeros(0, 4)] * 2, [torch.zeros(0, 4)])


def test_method_validates_eps_for_its_width_and_the_module_calls_the_function():
    with pytest.raises(ValueError, match=r"eps must be in \[0.00128, inf\), got 0.001"):
        METHODS["simdino"].loss(METHODS["simdino"].resolve({"eps": 0.001, "proj_output_dim": 128}), LOCAL)
    student, teacher = _views()
    options = {"eps": 0.2, "similarity_weight": 0.4, "expansion_of": "student"}
    assert torch.equal(SimDINOLoss(**options)(student, teacher).loss, simdino_loss(student, teacher, **options))


def test_head_is_dinos_without_its_last_layer():
    torch.manual_seed(0)
    head = dino_mlp(64, 500, 8)
    assert head[2].weight.std().item() == pytest.approx(0.02, rel=0.02) and not head[2].bias.any()
    assert head(torch.randn(3, 64)).shape == (3, 8)


def _step(comm, model, *views, **options):
    student = [model(view) for view in views]
    return simdino_loss(student, [view.flip(1) * 0.5 + 1 for view in student[:2]], comm=comm, **options)


def _step_covariance(comm, model, *views):
    return _step(comm, model, *views, form="covariance")


def _step_gram(comm, model, *views):
    return _step(comm, model, *views, form="gram", expansion_of="student")


@pytest.mark.ddp
@pytest.mark.parametrize("step", [_step_covariance, _step_gram])
@pytest.mark.parametrize("counts", [(8, 3), (2, 9, 1), (0, 5)])
def test_ranks_equal_the_joined_batch(ranks, step, counts):
    assert_joined(ranks, step, toy_views(sum(counts), 5, views=3), counts)
