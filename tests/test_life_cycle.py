"""The life cycle of methods with memory, frozen parameters or passes over the training set, with toy methods."""

import copy
import math
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from plugins.clock import Clock, Stepped
from plugins.distributed import LOCAL
from plugins.heads import mlp_head
from plugins.methods import METHODS
from plugins.objective import Objective, embed, encode
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import IndexedBank

N, D = 6, 4


class Terms(NamedTuple):
    loss: Tensor


class Prototypes(Stepped, nn.Module):
    """A predictor that starts each epoch with new weights, computed from the whole training set."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3, bias=False)
        self.seen: list[int] = []

    def predict(self, z: list[Tensor]) -> list[Tensor]:
        return [self.layer(view) for view in z]

    def start_epoch(self, epoch, feed):
        if feed is None:
            return ()
        self.seen = [int(index) for batch, _ in feed(view="eval", mode="eval") for index in batch]
        nn.init.constant_(self.layer.weight, epoch)
        return (self.layer.weight,)


class BankLoss(nn.Module):
    """Distance of z from the rows of a bank, times a learned scale."""

    def __init__(self, options, comm) -> None:
        super().__init__()
        self.clock = Clock()
        self.bank = IndexedBank(None, D)
        self.scale = nn.Parameter(torch.ones(()))
        self.comm = comm

    def forward(self, e: Embeddings) -> Terms:
        self.clock()
        loss = self.scale * (e.z[0] - self.bank.read(e.index)).square().sum() + sum(p.sum() for p in e.p)
        if self.training:
            self.bank.write(e.index, e.z[0].detach(), self.comm)
        return Terms(loss)


def _hints(options):
    return {"predictor": Hints(frozen_steps=2), "loss": Hints(lr_scale=0.1, no_decay=True), **options["more"]}


def toy(**more) -> MethodSpec:
    return MethodSpec(
        name="toy",
        loss=BankLoss,
        head=lambda features_dim, options: mlp_head(features_dim, 8, D, layers=2),
        predictor=lambda options, comm: Prototypes(),
        teacher=False,
        views=2,
        indexed=True,
        options={"proj_output_dim": Option(D, "width", low=1)},
        paper=Paper("Toy", "this file"),
        hints=lambda options: _hints({"more": more}),
    )


def made(**more) -> tuple[nn.Module, Prototypes, Objective]:
    torch.manual_seed(0)
    spec = toy(**more)
    head, predictor = spec.head(5, spec.resolve({})), spec.predictor(spec.resolve({}), LOCAL)
    objective = Objective(spec, spec.resolve({}), LOCAL, predictor, head)
    objective.allocate(N)
    return head, predictor, objective


def step(head, predictor, objective, optimizer, number: int, freeze: bool = True) -> None:
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(N, generator=generator)[:3]
    features = [torch.randn(3, 5, generator=generator) for _ in range(2)]
    objective.before_step()
    optimizer.zero_grad()
    objective(embed(features, head, predictor.predict, index=index)).loss.backward()
    if freeze:
        objective.after_backward()
    optimizer.step()
    objective.after_step()


def optimizer_of(objective: Objective) -> torch.optim.Optimizer:
    groups = [
        {"params": [*group.parameters.values()], "lr": 0.1 * group.hints.lr_scale, "name": group.name}
        for group in objective.groups
    ]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


def is_frozen(objective: Objective) -> bool:
    """Whether the predictor, which is never used, keeps no gradient."""
    weight = objective._heads[1].layer.weight
    weight.grad = torch.ones_like(weight)
    objective.after_backward()
    return weight.grad is None


def test_a_step_neither_waits_for_the_device_nor_walks_the_parameters(monkeypatch):
    """The number of steps is known without the device, and after the thaw there is nothing to look at."""
    head, predictor, objective = made()
    optimizer = optimizer_of(objective)
    step(head, predictor, objective, optimizer, 0)
    waits, walks = [], []
    convert, groups = Tensor.__int__, Objective.groups.fget
    monkeypatch.setattr(Tensor, "__int__", lambda self: waits.append(self) or convert(self))
    monkeypatch.setattr(Objective, "groups", property(lambda self: walks.append(self) or groups(self)))
    for number in range(1, 6):
        step(head, predictor, objective, optimizer, number)
    assert not waits and len(walks) == 1, "in the second step, in which the predictor is frozen for the last time"
    assert objective.clock.count == 6
    objective.load_state_dict(made()[2].state_dict())
    assert objective.clock.count == 0 and len(waits) == 1


def test_parameters_of_head_predictor_and_loss_are_grouped_by_their_hints():
    head, _, objective = made(**{"projector.3": Hints(momentum=0.0)})
    named = {group.name: sorted(group.parameters) for group in objective.groups}
    assert named["projector.3"] == ["projector.3.bias", "projector.3.weight"]
    assert named["predictor"] == ["predictor.layer.weight"] and named["loss"] == ["loss.scale"]
    every = [name for group in named.values() for name in group]
    assert len(every) == len(set(every)) == len(list(head.parameters())) + 2
    assert {group.name: group.hints for group in objective.groups}["loss"] == Hints(lr_scale=0.1, no_decay=True)


def test_a_hint_for_a_missing_part_is_refused():
    with pytest.raises(ValueError, match=r"toy gives hints for projector.last_layer, which have no parameters"):
        made(**{"projector.last_layer": Hints()})


@pytest.mark.parametrize("values", [{"momentum": 0.5}, {"frozen_steps": -1}, {"lr_scale": 0.0}])
def test_hints_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match="must be"):
        Hints(**values)


def test_the_options_of_the_predictors_rate_are_hints():
    spec = METHODS["byol"]
    options = spec.resolve(
        {"pred_lr_scale": 10.0, "pred_lr_constant": True, "proj_hidden_dim": 4, "pred_hidden_dim": 4}
    )
    objective = Objective(spec, options, LOCAL, spec.predictor(options, LOCAL), spec.head(3, options))
    assert {group.name: group.hints for group in objective.groups} == {
        "projector": Hints(),
        "predictor": Hints(lr_scale=10.0, lr_constant=True),
    }


def test_frozen_parameters_have_neither_decay_nor_momentum_and_thaw_at_their_step():
    head, predictor, objective = made()
    optimizer, first = optimizer_of(objective), predictor.layer.weight.clone()
    for number in range(2):
        step(head, predictor, objective, optimizer, number)
        assert torch.equal(predictor.layer.weight, first)
        assert not optimizer.state[predictor.layer.weight]
    step(head, predictor, objective, optimizer, 2)
    assert not torch.equal(predictor.layer.weight, first)


def test_freezing_counts_steps_and_not_micro_batches_and_survives_a_checkpoint():
    head, predictor, objective = made()
    optimizer = optimizer_of(objective)
    step(head, predictor, objective, optimizer, 0)
    state = copy.deepcopy(objective.state_dict())
    resumed = made()[2]
    resumed.load_state_dict(state)
    index = torch.arange(3)
    for _ in range(4):
        resumed.before_step()
        resumed.after_backward()
        z = [torch.randn(3, D, requires_grad=True) for _ in range(2)]
        resumed(Embeddings(z, z, z, index=index))
    assert int(resumed.clock.steps) == 2
    assert is_frozen(resumed)
    resumed.after_backward()
    resumed.after_step()
    resumed.before_step()
    resumed(Embeddings(z, z, z, index=index))
    assert not is_frozen(resumed)


def test_epochs_freeze_by_the_epoch_or_by_the_steps_of_one():
    objective = made(predictor=Hints(frozen_epochs=1))[2]
    objective.clock.steps += 3
    with pytest.raises(ValueError, match=r"predictor is frozen for 1 epoch,.*start_epoch"):
        is_frozen(objective)
    objective.clock.steps_per_epoch = 3
    assert is_frozen(objective)
    objective.clock.steps += 1
    assert not is_frozen(objective)
    objective.start_epoch(0)
    assert is_frozen(objective), "the number of the epoch comes first"


def test_a_parameter_that_was_replaced_is_grouped_and_frozen():
    _, predictor, objective = made()
    predictor.load_state_dict(copy.deepcopy(predictor.state_dict()), assign=True)
    assert any(predictor.layer.weight is each for group in objective.groups for each in group.parameters.values())
    predictor.layer.weight.grad = torch.ones_like(predictor.layer.weight)
    objective.after_backward()
    assert predictor.layer.weight.grad is None


def test_a_loop_that_forgets_to_freeze_is_warned():
    head, predictor, objective = made()
    optimizer = optimizer_of(objective)
    step(head, predictor, objective, optimizer, 0, freeze=False)
    with pytest.warns(UserWarning, match="call after_backward"):
        step(head, predictor, objective, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(head, predictor, objective, optimizer, 2)


def test_a_new_epoch_feeds_the_whole_set_and_names_what_it_initialised():
    head, predictor, objective = made()
    optimizer = optimizer_of(objective)
    for number in range(3):
        step(head, predictor, objective, optimizer, number)
    assert optimizer.state[predictor.layer.weight]
    fresh = objective.start_epoch(1, lambda **_: iter([(torch.tensor([0, 2]), []), (torch.tensor([4]), [])]))
    assert fresh == [predictor.layer.weight] and predictor.seen == [0, 2, 4]
    assert (predictor.layer.weight == 1).all() and objective.clock.epoch == 1
    assert objective.start_epoch(2) == []


def test_the_bank_is_allocated_once_and_comes_from_the_checkpoint():
    head, predictor, objective = made()
    step(head, predictor, objective, optimizer_of(objective), 0)
    spec = toy()
    resumed = Objective(spec, spec.resolve({}))
    resumed.load_state_dict(objective.state_dict())
    resumed.allocate(N)
    assert torch.equal(resumed.criterion.bank.rows, objective.criterion.bank.rows)
    with pytest.raises(ValueError, match="holds 6 images, but the training set has 7"):
        resumed.allocate(7)


def test_after_step_moves_the_teacher():
    objective = made()[2]
    student, teacher = nn.Linear(2, 1), nn.Linear(2, 1)
    before = teacher.weight.clone()
    objective.set_teacher([teacher], [student])
    objective.after_step()
    assert torch.equal(teacher.weight, before)
    objective.after_step(0.75)
    torch.testing.assert_close(teacher.weight, 0.75 * before + 0.25 * student.weight)
    with pytest.raises(ValueError, match="tau"):
        objective.after_step(math.nan)


def test_the_patches_of_an_image_are_encoded_in_one_pass():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 2), nn.AdaptiveAvgPool2d(1))
    stack = torch.randn(2, 9, 3, 4, 4)
    features = encode(backbone, stack)
    assert features.shape == (2, 9, 5)
    torch.testing.assert_close(features[1, 7], backbone(stack[1, 7:8]).flatten())
    assert encode(backbone, stack[:, 0]).shape == (2, 5)


@pytest.mark.parametrize(
    ("given", "message"), [((1, 0, 0), "needs 1 stack of patches per image, got none"), ((2, 0, 1), "1 large")]
)
def test_the_number_of_stacks_is_checked(given, message):
    from dataclasses import replace

    spec = replace(toy(), views=1, stacks=1)
    spec.check_views(1, 0, 1)
    with pytest.raises(ValueError, match=message):
        spec.check_views(*given)
    with pytest.raises(ValueError, match=r"needs no stacks of patches per image, got 1"):
        toy().check_views(2, 0, 1)


def test_a_predictor_may_have_a_memory_too():
    from dataclasses import replace

    spec = replace(toy(), predictor=lambda options, comm: nn.Sequential(IndexedBank(None, D)), hints=lambda options: {})
    predictor = spec.predictor(spec.resolve({}), LOCAL)
    Objective(spec, spec.resolve({}), LOCAL, predictor).allocate(N)
    assert predictor[0].size == N
