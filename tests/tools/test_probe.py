"""Probes of frozen features: their training, their labels, what a setting is chosen on."""

import math

import numpy as np
import pytest
import torch

from plugins.heads import issl_head
from plugins.tools import probe as module
from plugins.tools.probe import Probe, Setting, accuracy, evaluate_probe, fit_probe, stratified
from plugins.tools.probe_sklearn import draw_strengths, fit_classifier

TWO = (Setting(1e-4, 0.5), Setting(1e-5, 0.5))
QUICK = Probe(grid=TWO, epochs=40, batch_size=32, hidden_dim=32)


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
    probe = Probe(epochs=7, batch_size=30)
    fitted = fit_probe(features, labels, 3, probe, Setting(0.02, 0.3), seed=4)
    torch.manual_seed(4)
    (start,) = issl_head(5, 3)
    keywords = {"lr": 0.3, "weight_decay": 0.02, "epochs": 7}
    weight, bias = _reference_linear(features, labels, start.weight.detach(), start.bias.detach(), **keywords)
    np.testing.assert_allclose(fitted[0].weight.detach().numpy(), weight, atol=1e-5)
    np.testing.assert_allclose(fitted[0].bias.detach().numpy(), bias, atol=1e-5)


def test_amdims_linear_probe_takes_the_step_of_its_loss():
    """The softmax of 10 tanh(x / 10) minus the labels, times the derivative of tanh, plus x / 500 over N C."""
    features, labels = blobs(30)
    features = 20 * features
    probe = Probe(kind="amdim_linear", epochs=1, batch_size=30)
    fitted = fit_probe(features, labels, 3, probe, Setting(0.0, 0.3), seed=4)
    torch.manual_seed(4)
    (start,) = issl_head(5, 3)
    weight, bias = (part.detach().double().numpy() for part in (start.weight, start.bias))
    x = features.double().numpy() @ weight.T + bias
    squashed = 10 * np.tanh(x / 10)
    chance = np.exp(squashed) / np.exp(squashed).sum(1, keepdims=True)
    error = (chance - np.eye(3)[labels.numpy()]) / 30 * (1 - (squashed / 10) ** 2) + 2e-3 * x / x.size
    np.testing.assert_allclose(fitted[0].weight.detach().numpy(), weight - 0.3 * error.T @ features.numpy(), atol=1e-5)
    np.testing.assert_allclose(fitted[0].bias.detach().numpy(), bias - 0.3 * error.sum(0), atol=1e-5)


def test_amdims_mlp_drops_features_in_training_only():
    features, labels = blobs(90)
    probe = QUICK._replace(kind="amdim_mlp", hidden_dim=16)
    fitted = fit_probe(features, labels, 3, probe, Setting(0.0, 0.1), seed=0)
    assert torch.equal(fitted(features), fitted(features)) and not fitted.training
    assert accuracy(fitted, *blobs(90, seed=1))[0] > 95
    shapes = [tuple(parameter.shape) for parameter in fitted.parameters()]
    assert shapes == [(16, 5), (16,), (16,), (3, 16), (3,)], "no bias before batch norm"
    dropped = [layer.p for layer in fitted if isinstance(layer, torch.nn.Dropout)]
    assert dropped == [0.2, 0.2] and isinstance(fitted[0], torch.nn.Dropout)


def test_mlp_has_two_hidden_layers_and_separates_what_no_linear_probe_can():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(400, 2, generator=generator) * 2 - 1
    labels = (features.prod(1) > 0).long()
    linear, mlp = (
        fit_probe(features, labels, 2, QUICK._replace(kind=kind), Setting(0.0, 0.5), seed=0)
        for kind in ("linear", "mlp")
    )
    assert accuracy(linear, features, labels)[0] < 70
    assert accuracy(mlp, features, labels)[0] > 95
    widths = [tuple(layer.weight.shape) for layer in mlp if isinstance(layer, torch.nn.Linear)]
    assert widths == [(32, 2), (32, 32), (2, 32)]


def test_a_single_row_left_over_is_no_batch():
    features, labels = blobs(33)
    fitted = fit_probe(features, labels, 3, QUICK._replace(kind="mlp", epochs=1), Setting(0.0, 0.5), seed=0)
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

    def fit(features, labels, classes, probe, setting, *, seed):
        calls.append((setting.weight_decay, len(features)))
        return torch.nn.Identity() if setting.weight_decay == 1 else lambda rows: rows.roll(1, dims=1)

    return fit


@pytest.mark.parametrize(
    ("select", "chosen", "first", "fits"),
    [("validation", 1, 0.0, [(2, 40), (2, 36), (1, 40), (1, 36)]), ("test", 2, 100.0, [(2, 40), (1, 40)])],
)
def test_setting_is_chosen_on_held_out_labels_unless_asked_otherwise(monkeypatch, select, chosen, first, fits):
    calls = []
    monkeypatch.setattr(module, "fit_probe", _preset(calls))
    labels = torch.arange(40) % 4
    train, test = (torch.eye(4)[labels], labels), (torch.eye(4)[labels].roll(-1, dims=1), labels)
    row = evaluate_probe(train, test, Probe(grid=(Setting(2), Setting(1))), select=select)
    assert (row["select"], row["weight_decay"], row["acc1"], row["labels"]) == (select, chosen, first, 40)
    assert [entry["acc1"] for entry in row["grid"]] == [100.0, 0.0]
    held = [entry["validation_acc1"] for entry in row["grid"]]
    assert held == ([0.0, 100.0] if select == "validation" else [None, None])
    assert calls == fits


def test_of_one_setting_nothing_is_chosen():
    row = evaluate_probe(blobs(60), blobs(30, seed=1), QUICK._replace(grid=TWO[:1], fraction=0.05))
    assert (row["select"], row["labels"], row["dim"], len(row["grid"])) == (None, 3, 5, 1)
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


def _reference_step(setting, weight, gradient, momentum):
    """One step of an optimiser on a matrix, in float64, and its momentum."""
    if setting.optimizer == "adamw":  # of the first step both moments are unbiased: the gradient's sign
        shrunk = weight * (1 - setting.lr * setting.weight_decay)
        return shrunk - setting.lr * gradient / (abs(gradient) + 1e-8), None
    gradient = gradient + setting.weight_decay * weight
    ratio = 0.001 * np.linalg.norm(weight) / (np.linalg.norm(gradient - setting.weight_decay * weight) + (
        setting.weight_decay * np.linalg.norm(weight)))  # fmt: skip
    momentum = 0.9 * momentum + ratio * gradient
    return weight - setting.lr * momentum, momentum


@pytest.mark.parametrize("setting", [Setting(0.02, 0.3, "adamw"), Setting(0.02, 9.0, "lars"), Setting(0, 9.0, "lars")])
def test_first_step_of_each_optimizer(setting):
    features, labels = blobs(30)
    fitted = fit_probe(features, labels, 3, Probe(epochs=1, batch_size=30), setting, seed=4)
    torch.manual_seed(4)
    (start,) = issl_head(5, 3)
    rows, weight, bias = (part.detach().double().numpy() for part in (features, start.weight, start.bias))
    chance = np.exp(rows @ weight.T + bias)
    error = (chance / chance.sum(1, keepdims=True) - np.eye(3)[labels.numpy()]) / len(rows)
    wanted, _ = _reference_step(setting, weight, error.T @ rows, 0.0)
    assert abs(wanted - weight).max() > 1e-4
    np.testing.assert_allclose(fitted[0].weight.detach().numpy(), wanted, atol=1e-6)


def test_normalized_probe_sees_neither_scale_nor_offset():
    features, labels = blobs(60)
    odd = features * torch.tensor([0.1, 1.0, 1e3, 1.0, 1.0]) + 100
    probe, setting = Probe(epochs=40, batch_size=10), Setting(0.0, 0.5, normalized=True)
    plain, moved = (fit_probe(rows, labels, 3, probe, setting, seed=0) for rows in (features, odd))
    assert not list(plain[0].parameters())
    agreeing = plain(features).argmax(1) == moved(odd).argmax(1)
    assert agreeing.float().mean() > 0.95
    assert accuracy(moved, odd, labels)[0] > 95
    without = fit_probe(odd, labels, 3, probe, setting._replace(normalized=False), seed=0)
    assert accuracy(without, odd, labels)[0] < 90


@pytest.mark.sample("probe0", "probe5")
@pytest.mark.parametrize(
    "probe",
    [
        *(QUICK._replace(grid=(Setting(1e-6, 0.5, name),)) for name in ("sgd", "adamw")),
        QUICK._replace(grid=(Setting(1e-6, 50.0, "lars"),)),
        QUICK._replace(grid=(Setting(normalized=True),)),
        *(Probe(kind, C=(1.0,)) for kind in ("logistic", "svc")),
    ],
)
def test_separable_features_give_all_and_random_labels_chance(probe):
    features, labels = blobs(300, classes=4, dim=8)
    apart = 4 * torch.eye(8)[labels] + 0.1 * features, labels
    assert evaluate_probe(apart, apart, probe)["acc1"] == 100
    guesses = torch.randint(4, (300,), generator=torch.Generator().manual_seed(5))
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(6)), torch.arange(2000) % 4
    # of 2000 guesses the standard deviation is 0.97 points
    assert evaluate_probe((features, guesses), noise, probe)["acc1"] == pytest.approx(25, abs=6)


def test_logistic_and_svc_are_scikit_learns():
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    (features, labels), (rows, wanted) = blobs(90), blobs(60, seed=1)
    features, rows = features * 0.5, rows * 0.5
    low, high = features.numpy().min(0), features.numpy().max(0)
    scaled, scaled_test = ((part.numpy() - low) / (high - low) for part in (features, rows))
    theirs = {
        "logistic": LogisticRegression(C=0.3, max_iter=1000).fit(scaled, labels.numpy()),
        "svc": LinearSVC(C=0.3, dual=False).fit(scaled, labels.numpy()),
    }
    for kind, model in theirs.items():
        row = evaluate_probe((features, labels), (rows, wanted), Probe(kind, C=(0.3,)))
        assert row["acc1"] == pytest.approx(100 * model.score(scaled_test, wanted.numpy()))
        assert 60 < row["acc1"] < 100
        scores = fit_classifier(kind, features, labels, 3, C=0.3, seed=0)(rows)
        np.testing.assert_allclose(scores.numpy(), model.decision_function(scaled_test), atol=1e-3)


def test_classes_that_no_label_has_are_never_chosen():
    features, labels = blobs(60, classes=2)
    for kind in ("logistic", "svc"):
        scores = fit_classifier(kind, features, labels * 2 + 1, 5, C=1.0, seed=0)(features)
        assert scores.argmax(1).unique().tolist() == [1, 3]
        assert scores[:, [0, 2, 4]].isneginf().all()


def test_drawn_strengths_are_log_uniform():
    drawn = np.log10(draw_strengths(2000, 0))
    assert -4 <= drawn.min() < -3.9 and 1.9 < drawn.max() <= 2
    assert drawn.mean() == pytest.approx(-1, abs=6 * (6 / 12**0.5) / 2000**0.5)  # six standard errors
    assert draw_strengths(10, 3) == draw_strengths(10, 3) != draw_strengths(10, 4)
    grid = evaluate_probe(blobs(60), blobs(30, seed=1), Probe("logistic", search=3), seed=3)["grid"]
    assert [row["C"] for row in grid] == draw_strengths(3, 3)


@pytest.mark.sample("probe1")
@pytest.mark.parametrize(
    "probe", [QUICK._replace(grid=(Setting(1.0, 1e-4), *TWO)), Probe("logistic", C=(1e-4, 1e-2, 1.0))]
)
def test_what_is_chosen_does_not_depend_on_the_test_rows(probe):
    (features, labels), test = blobs(300), blobs(60, seed=1)
    train = features + 3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(2)), labels
    keys = ("weight_decay", "lr", "C")
    other = -test[0], test[1].flip(0)
    rows = [evaluate_probe(train, side, probe) for side in (test, other)]
    chosen = [[row.get(key) for key in keys] for row in rows]
    assert chosen[0] == chosen[1]
    held = [[entry["validation_acc1"] for entry in row["grid"]] for row in rows]
    assert held[0] == held[1] and len(set(held[0])) > 1
    assert rows[0]["acc1"] != rows[1]["acc1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "knn"}, "kind must be one of linear, mlp, amdim_linear, amdim_mlp, logistic, svc, got 'knn'"),
        ({"grid": ()}, "a linear probe needs a grid of settings, and neither C nor search"),
        ({"search": 3}, "a linear probe needs a grid of settings, and neither C nor search"),
        ({"kind": "svc", "grid": ()}, "a svc probe needs either C or search, and no other setting"),
        ({"kind": "logistic", "C": (1.0,)}, "a logistic probe needs either C or search, and no other setting"),
        ({"kind": "logistic", "grid": (), "C": (1.0,), "search": 2}, "needs either C or search"),
        ({"kind": "logistic", "grid": (), "C": (0.0,)}, "C must be above 0, got 0.0"),
        ({"grid": (Setting(-1.0),)}, r"weight_decay must be in \[0, inf\), got -1.0"),
        ({"grid": (Setting(optimizer="adam"),)}, "optimizer must be one of sgd, lars, adamw, got 'adam'"),
        ({"fraction": 0.0}, "fraction must be above 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "fraction must be above 0 and at most 1, got 1.5"),
        ({"holdout": 1.0}, "holdout must be between 0 and 1, got 1.0"),
        ({"grid": (Setting(lr=0.0),)}, "lr must be above 0, got 0.0"),
        ({"epochs": 0}, r"epochs must be in \[1, inf\), got 0"),
        ({"batch_size": 1}, r"batch_size must be in \[2, inf\), got 1"),
        ({"fraction": 0.02}, "cannot split 60 labels into 1 and 59 with each of the 3 classes"),
        ({"fraction": 0.05}, "cannot split 3 labels into 3 and 0 with each of the 3 classes"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_probe(blobs(60), blobs(30, seed=1), QUICK._replace(**change))
