"""Probes of frozen features: their training, their labels, what a weight decay is chosen on."""

import math

import numpy as np
import pytest
import torch

from plugins.heads import issl_head
from plugins.tools import probe as module
from plugins.tools.probe import Probe, accuracy, evaluate_probe, fit_probe, stratified

QUICK = Probe(lr=0.5, epochs=40, batch_size=32, hidden_dim=32)


def blobs(rows, *, seed=0, classes=3, dim=5):
    """Three well separated classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % classes
    centres = 4 * torch.eye(dim)[:classes]
    return centres[labels] + torch.randn(rows, dim, generator=generator), labels


def _reference_linear(features, labels, weight, bias, *, lr, weight_decay, epochs):
    """Full-batch SGD with momentum 0.9, L2 on weights and biases, a cosine schedule to 0, in float64."""
    features, weight, bias = (part.double().numpy() for part in (features, weight, bias))
    wanted = np.eye(len(bias))[labels.numpy()]
    steps = [np.zeros_like(weight), np.zeros_like(bias)]
    for epoch in range(epochs):
        scores = features @ weight.T + bias
        chance = np.exp(scores - scores.max(1, keepdims=True))
        error = (chance / chance.sum(1, keepdims=True) - wanted) / len(features)
        gradients = error.T @ features + weight_decay * weight, error.sum(0) + weight_decay * bias
        steps = [0.9 * step + gradient for step, gradient in zip(steps, gradients, strict=True)]
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        weight, bias = weight - rate * steps[0], bias - rate * steps[1]
    return weight, bias


def test_linear_probe_is_plain_sgd():
    features, labels = blobs(30)
    probe = Probe(lr=0.3, epochs=7, batch_size=30)
    fitted = fit_probe(features, labels, 3, probe, weight_decay=0.02, seed=4)
    torch.manual_seed(4)
    (start,) = issl_head(5, 3)
    keywords = {"lr": 0.3, "weight_decay": 0.02, "epochs": 7}
    weight, bias = _reference_linear(features, labels, start.weight.detach(), start.bias.detach(), **keywords)
    np.testing.assert_allclose(fitted[0].weight.detach().numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(fitted[0].bias.detach().numpy(), bias, atol=1e-5)


def test_mlp_has_two_hidden_layers_and_separates_what_no_linear_probe_can():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(400, 2, generator=generator) * 2 - 1
    labels = (features.prod(1) > 0).long()
    linear, mlp = (
        fit_probe(features, labels, 2, QUICK._replace(kind=kind), weight_decay=0.0, seed=0)
        for kind in ("linear", "mlp")
    )
    assert accuracy(linear, features, labels)[0] < 70
    assert accuracy(mlp, features, labels)[0] > 95
    widths = [tuple(layer.weight.shape) for layer in mlp if isinstance(layer, torch.nn.Linear)]
    assert widths == [(32, 2), (32, 32), (2, 32)]


def test_a_single_row_left_over_is_no_batch():
    features, labels = blobs(33)
    fitted = fit_probe(features, labels, 3, QUICK._replace(kind="mlp", epochs=1), weight_decay=0.0, seed=0)
    assert all(value.isfinite().all() for value in fitted.state_dict().values())


def test_accuracy_counts_first_and_first_five():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]])
    assert accuracy(torch.nn.Identity(), scores, torch.tensor([0, 0, 4, 5])) == (50.0, 75.0)
    assert accuracy(torch.nn.Identity(), scores[:, :2], torch.tensor([0, 1, 1, 1])) == (25.0, 100.0)


def test_draws_hold_each_class_in_its_share():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    drawn, others = stratified(labels, 20, 3)
    assert labels[drawn].bincount().tolist() == [12, 6, 2]
    assert sorted([*drawn.tolist(), *others.tolist()]) == list(range(100))
    assert stratified(labels, 20, 3)[0].equal(drawn)
    assert not stratified(labels, 20, 4)[0].equal(drawn)


def _preset(calls):
    """Fits of two kinds: with weight decay 1 right where features are as in training, with 2 right where shifted."""

    def fit(features, labels, classes, probe, *, weight_decay, seed):
        calls.append((weight_decay, len(features)))
        return torch.nn.Identity() if weight_decay == 1 else lambda rows: rows.roll(1, dims=1)

    return fit


@pytest.mark.parametrize(
    ("select", "chosen", "first", "fits"),
    [("validation", 1, 0.0, [(2, 40), (2, 36), (1, 40), (1, 36)]), ("test", 2, 100.0, [(2, 40), (1, 40)])],
)
def test_weight_decay_is_chosen_on_held_out_labels_unless_asked_otherwise(monkeypatch, select, chosen, first, fits):
    calls = []
    monkeypatch.setattr(module, "fit_probe", _preset(calls))
    labels = torch.arange(40) % 4
    train, test = (torch.eye(4)[labels], labels), (torch.eye(4)[labels].roll(-1, dims=1), labels)
    row = evaluate_probe(train, test, Probe(weight_decay=(2, 1)), select=select)
    assert (row["select"], row["weight_decay"], row["acc1"], row["labels"]) == (select, chosen, first, 40)
    assert [entry["acc1"] for entry in row["grid"]] == [100.0, 0.0]
    held = [entry["validation_acc1"] for entry in row["grid"]]
    assert held == ([0.0, 100.0] if select == "validation" else [None, None])
    assert calls == fits


def test_of_one_weight_decay_nothing_is_chosen():
    row = evaluate_probe(blobs(60), blobs(30, seed=1), QUICK._replace(weight_decay=(1e-3,), fraction=0.05))
    assert (row["select"], row["labels"], row["dim"], len(row["grid"])) == ("nothing", 3, 5, 1)
    assert row["acc1"] == row["grid"][0]["acc1"] > 80
    assert row["acc5"] == 100


def test_result_depends_on_the_seed_alone():
    train, test = blobs(90), blobs(60, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = evaluate_probe(train, test, QUICK._replace(fraction=0.3, epochs=2), seed=1)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert evaluate_probe(train, test, QUICK._replace(fraction=0.3, epochs=2), seed=1) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "knn"}, "kind must be one of linear, mlp, got 'knn'"),
        ({"weight_decay": ()}, "weight_decay must name at least one value"),
        ({"weight_decay": (-1.0,)}, r"weight_decay must be in \[0, inf\), got -1.0"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ({"holdout": 1.0}, "holdout must be between 0 and 1, got 1.0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"epochs": 0}, r"epochs must be in \[1, inf\), got 0"),
        ({"batch_size": 1}, r"batch_size must be in \[2, inf\), got 1"),
        ({"fraction": 0.02}, "1 of 60 labels cannot be drawn with a label of each of the 3 classes"),
        ({"fraction": 0.05}, "3 of 3 labels cannot be drawn with a label of each of the 3 classes"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_probe(blobs(60), blobs(30, seed=1), QUICK._replace(**change))
