"""DINO: loss and centre by a slow reference, terms, gradient, several processes."""

import numpy as np
import pytest
import torch

from plugins.distributed import LOCAL
from plugins.heads import dino_head
from plugins.losses import DINOLoss, dino_loss, dino_terms, teacher_temperature
from plugins.methods import METHODS
from plugins.objective import Objective
from plugins.spec import Embeddings
from plugins.testing import DIFFICULT, devices, difficult_views


def _softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _reference_dino(students, teachers, centers, tau_t, tau_s):
    targets = [*enumerate(zip(teachers, centers, strict=True))]
    pairs = [(s, t, c) for v, s in enumerate(students) for u, (t, c) in targets if u != v]
    losses = [-(_softmax((t - c) / tau_t) * np.log(_softmax(s / tau_s))).sum(1).mean() for s, t, c in pairs]
    return sum(losses) / len(pairs)


def _views(rows=6, classes=5, seed=0, views=(2, 2)):
    generator = torch.Generator().manual_seed(seed)
    return tuple(list(torch.randn(n, rows, classes, generator=generator, dtype=torch.float64)) for n in views)


@pytest.mark.parametrize("views", [(2, 2), (4, 2), (3, 1)])
def test_loss_is_that_of_the_formula_over_all_pairs_of_different_views(views):
    students, teachers = _views(views=views)
    center = torch.linspace(-1, 1, 5, dtype=torch.float64)
    expected = _reference_dino(
        [s.numpy() for s in students], [t.numpy() for t in teachers], [center.numpy()] * views[1], 0.2, 0.3
    )
    value = dino_loss(students, teachers, center, tau_teacher=0.2, tau_student=0.3)
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_centre_of_views_moves_after_each_teacher_view_and_in_training_only():
    loss = DINOLoss(5, moves="view", center_momentum=0.7, tau_student=0.3, tau_teacher=0.2).double()
    center = np.zeros(5)
    for seed in range(3):
        students, teachers = _views(seed=seed)
        centers = [center]
        for teacher in teachers:
            center = 0.7 * center + 0.3 * teacher.numpy().mean(0)
            centers.append(center)
        arrays = ([view.numpy() for view in views] for views in (students, teachers))
        expected = _reference_dino(*arrays, centers[:2], 0.2, 0.3)
        assert loss(students, teachers).loss.item() == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)
    before = loss.center.clone()
    loss.eval()(students, teachers)
    assert torch.equal(loss.center, before)


def test_centre_moves_once_per_batch_after_the_loss():
    """In the original. After one step it is 0.1 times the mean of the raw logits of all teacher views."""
    loss, center = DINOLoss(5, tau_student=0.3, tau_teacher=0.2).double(), np.zeros(5)
    for seed in range(3):
        students, teachers = _views(seed=seed, views=(3, 2))
        arrays = ([view.numpy() for view in views] for views in (students, teachers))
        expected = _reference_dino(*arrays, [center] * 2, 0.2, 0.3)
        assert loss(students, teachers).loss.item() == pytest.approx(expected, rel=1e-12)
        center = 0.9 * center + 0.1 * torch.cat(teachers).numpy().mean(0)
        np.testing.assert_allclose(loss.center.numpy(), center, rtol=1e-12)
    before = loss.center.clone()
    loss.eval()(students, teachers)
    assert torch.equal(loss.center, before)


def test_micro_batches_of_a_step_move_the_centre_once_as_one_batch():
    students, teachers = _views(rows=7)
    whole, parts = DINOLoss(5).double(), DINOLoss(5).double()
    for _ in range(2):
        value = whole(students, teachers).loss
        parts.before_step()
        values = [parts([s[r] for s in students], [t[r] for t in teachers]).loss for r in (slice(0, 2), slice(2, 7))]
        torch.testing.assert_close((2 * values[0] + 5 * values[1]) / 7, value, rtol=1e-12, atol=0)
        parts.after_step()
        parts.after_step()
        torch.testing.assert_close(parts.center, whole.center, rtol=1e-12, atol=0)
    parts.before_step()
    parts(students, teachers)
    parts.load_state_dict(whole.state_dict())  # drops the open step
    parts.after_step()
    assert torch.equal(parts.center, whole.center)


def test_temperature_of_the_teacher_rises_in_equal_steps():
    assert teacher_temperature(0) == teacher_temperature(99) == 0.04
    values = [teacher_temperature(epoch, first=0.04, last=0.07, epochs=30) for epoch in range(40)]
    np.testing.assert_allclose(values[:30], np.linspace(0.04, 0.07, 30))
    assert values[30:] == [0.07] * 10
    assert teacher_temperature(0, first=0.04, last=0.07, epochs=1) == 0.04


def test_terms_and_gradient():
    students, teachers = _views()
    students = [view.requires_grad_() for view in students]
    center = torch.zeros(5, dtype=torch.float64)
    terms = dino_terms(students, teachers, center)
    assert terms.loss.requires_grad and not terms.H_Mlz.requires_grad
    entropy = 0.0
    for teacher in teachers:
        p = _softmax(teacher.numpy() / 0.04)
        entropy -= (p * np.log(p)).sum(1).mean() / 2
    assert terms.H_Mlz.item() == pytest.approx(entropy)
    assert torch.autograd.gradcheck(lambda *s: dino_loss(s, teachers, center), students)
    uniform = [torch.zeros(4, 5)] * 2
    assert dino_loss(uniform, uniform, torch.zeros(5)).item() == pytest.approx(np.log(5))
    halves = [[view.half() for view in views] for views in (students, teachers)]
    assert dino_loss(*halves, center.float()).item() == pytest.approx(terms.loss.item(), rel=1e-2)


@pytest.mark.parametrize(
    ("views", "message"),
    [((1, 1), "got 1 and 1"), ((2, 3), "got 2 and 3"), ((2, 0), "got 2 and 0")],
)
def test_numbers_of_views_that_do_not_go_together_are_refused(views, message):
    with pytest.raises(ValueError, match=message):
        dino_loss(*_views(views=views), torch.zeros(5, dtype=torch.float64))


def _method(**given):
    spec = METHODS["dino"]
    small = {"proj_hidden_dim": 6, "bottleneck_dim": 4, "num_prototypes": 5, **given}
    options = spec.resolve(small)
    torch.manual_seed(0)
    head = spec.head(3, options)
    return Objective(spec, options, LOCAL, None, head).double(), head.double()


def test_last_layer_is_frozen_for_epochs_and_the_temperature_follows_the_epoch():
    temperatures = {"teacher_temperature": 0.07, "warmup_teacher_temperature_epochs": 3}
    objective, head = _method(freeze_last_layer=1, **temperatures)
    features = list(torch.randn(3, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    found, center = [], np.zeros(5)
    for epoch in range(4):
        objective.start_epoch(epoch)
        objective.before_step()
        z = [head(view) for view in features]
        teachers = [view.detach().flip(0) for view in z[:2]]
        loss = objective(Embeddings(z, z, teachers)).loss
        tau = [0.04, 0.055, 0.07, 0.07][epoch]
        arrays = [view.detach().numpy() for view in z], [view.numpy() for view in teachers]
        assert loss.item() == pytest.approx(_reference_dino(*arrays, [center] * 2, tau, 0.1), rel=1e-9)
        center = 0.9 * center + 0.1 * torch.cat(teachers).numpy().mean(0)
        loss.backward()
        objective.after_backward()
        found.append([head.mlp[0].weight.grad is not None, head.last_layer.weight.grad is not None])
        head.zero_grad()
        objective.after_step()
    assert found == [[True, False]] + [[True, True]] * 3
    np.testing.assert_allclose(objective.state_dict()["criterion.dino.center"], center, rtol=1e-9)
    assert objective.state_dict()["criterion.clock.steps"] == 4


def test_a_warm_up_needs_the_epoch():
    objective, _ = _method(freeze_last_layer=0, warmup_teacher_temperature_epochs=3)
    views = _views()[0]
    with pytest.raises(ValueError, match=r"whose number is unknown; call start_epoch .* or set warmup_teacher"):
        objective(Embeddings(views, views, views))


def test_logits_are_cosines_with_the_rows_of_the_last_layer():
    head = dino_head(3, 6, 4, 5)
    x = torch.randn(7, 3)
    unit = head.unit(head.mlp(x))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(7))
    rows = torch.nn.functional.normalize(head.last_layer.weight, dim=1)
    torch.testing.assert_close(head(x), unit @ rows.T)
    assert [type(layer).__name__ for layer in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert head.last_layer.bias is None


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="moves must be one of batch, view, got 'step'"):
        DINOLoss(5, moves="step")
    with pytest.raises(ValueError, match="center_momentum must be in"):
        DINOLoss(5, center_momentum=1.1)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", DIFFICULT)
def test_difficult_batches_are_finite(kind, device):
    for shape in ((1, 5), (2, 40), (40, 6)):
        loss = DINOLoss(shape[1]).to(device)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            views = [view.to(device, dtype).requires_grad_() for view in difficult_views(kind, *shape)]
            value = loss(views, views).loss
            assert value.dtype == torch.float32 and value.isfinite() and loss.center.isfinite().all()
            assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, views))


@pytest.mark.slow
def test_compiles_to_one_graph():
    students, teachers = ([view.float() for view in views] for views in _views())
    compiled = torch.compile(dino_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(students, teachers, torch.zeros(5)), dino_loss(students, teachers, torch.zeros(5))
    )


def test_bare_tensors_are_refused():
    with pytest.raises(ValueError, match=r"student .* pass a list of views, such as \[s0, s1\]"):
        dino_loss(torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(5))


def _step(comm, moves, students, teachers):
    loss = DINOLoss(5, moves=moves, comm=comm).double()
    students = [view.requires_grad_() for view in students]
    value = loss(students, teachers).loss
    return value.detach(), loss.center, torch.autograd.grad(value, students)


@pytest.mark.ddp
@pytest.mark.parametrize("moves", ["batch", "view"])
@pytest.mark.parametrize("parts", [[slice(0, 2), slice(2, 7)], [slice(0, 1), slice(1, 1), slice(1, 7)]])
def test_ranks_have_the_loss_and_the_centre_of_the_joined_batch(ranks, moves, parts):
    students, teachers = _views(rows=7)
    value, center, gradients = _step(LOCAL, moves, students, teachers)
    students = [view.detach() for view in students]
    found = ranks.run(_step, [(moves, [s[rows] for s in students], [t[rows] for t in teachers]) for rows in parts])
    for (their_value, their_center, theirs), rows in zip(found, parts, strict=True):
        torch.testing.assert_close((their_value, their_center), (value, center), rtol=1e-12, atol=1e-14)
        for ours, gradient in zip(theirs, gradients, strict=True):  # of which the processes take the mean
            torch.testing.assert_close(ours / len(parts), gradient[rows], rtol=1e-10, atol=1e-14)
