"""The figures of the toy model: the numbers in their table, and that they are not empty."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from plugins.experiments import run as experiments
from plugins.experiments import toy_dynamics
from plugins.experiments.suites import Step, toy
from plugins.experiments.theory import gram_eigenvalues

ROOT = Path(__file__).parents[2]


@pytest.fixture
def few_samples(monkeypatch):
    """A quarter of the samples of a step: the time of the cosine metric is in drawing them."""
    monkeypatch.setattr(toy_dynamics, "SAMPLES", 512)


def test_suite_names_the_figures_that_there_are():
    assert tuple(toy_dynamics.FIGURES) == toy.FIGURES


def test_starts_are_those_of_the_published_figures():
    (ten,) = toy_dynamics.starts(10, 15, 0.25)
    np.testing.assert_allclose(gram_eigenvalues(ten)[[0, -1]], [0.0200, 2.2383], atol=6e-5)
    small, other = toy_dynamics.starts(2, 6, 0.25, 0.5)
    np.testing.assert_allclose(gram_eigenvalues(small), [0.0795, 0.3836], atol=6e-5)
    np.testing.assert_allclose(gram_eigenvalues(2 * small), [0.3181, 1.5343], atol=6e-5)
    np.testing.assert_allclose(gram_eigenvalues(other), [0.5419, 1.8892], atol=6e-5)


def test_deviation_is_relative_to_the_largest_value_of_the_theory():
    theory = np.array([[1.0, 4.0], [2.0, 5.0]])
    simulated = theory + np.array([[0.0, 0.2], [0.5, 0.0]])
    row = toy_dynamics.compare("figure", "case", 0.1, simulated, theory)
    assert row.deviation == pytest.approx(0.1)
    assert (row.simulated, row.theory, row.steps) == ((2.5, 5.0), (2.0, 5.0), 1)


@pytest.mark.slow
def test_the_suite_draws_figures_and_a_table(tmp_path, monkeypatch, capfd):
    """End to end with a fiftieth of the steps; a second call skips what is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    draw, short = toy._figure_run, ("--fraction", "0.02")

    def quick(name, results):
        run = draw(name, results)
        return replace(run, steps=tuple(Step(step.name, (*step.arguments, *short)) for step in run.steps))

    monkeypatch.setattr(toy, "_figure_run", quick)
    assert experiments.main(["toy_dynamics"]) == 0, capfd.readouterr()
    results = tmp_path / "results" / "toy_dynamics"
    table = (results / "table.md").read_text()
    assert table in capfd.readouterr().out
    for name in toy.FIGURES:
        assert f"| {name} |" in table
        assert (results / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        picture = np.asarray(Image.open(results / f"{name}.png").convert("RGB")).reshape(-1, 3)
        assert len(picture) > 300_000
        # axes, text and curves of several colours
        assert 0.01 < (picture != 255).any(1).mean() < 0.5
        assert len(np.unique(picture // 32 @ [64, 8, 1])) > 20
        result = json.loads((results / "numpy" / name / "seed2" / "result.json").read_text())
        assert 0 < result["largest_deviation"] < 0.1
    assert experiments.main(["toy_dynamics"]) == 0
    assert capfd.readouterr().out.count("skipped, finished before") == 4


@pytest.mark.slow
def test_same_numbers_give_the_same_files(tmp_path):
    for folder in ("a", "b"):
        toy_dynamics.draw("early_growth", tmp_path / folder, fraction=0.01)
    for suffix in ("json", "pdf", "png"):
        first, second = (tmp_path / folder / f"early_growth.{suffix}" for folder in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectra"], "there is no figure 'spectra'; choose from eigenvalues, weight_decay, early_growth, two_neurons"),
        (["--fraction", "2"], "must be above 0 and at most 1, got '2'"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        toy_dynamics.main(arguments)
    assert message in capsys.readouterr().err


def test_a_table_of_nothing_is_an_error(tmp_path, capsys):
    assert toy_dynamics.main(["--table", str(tmp_path)]) == 1
    assert "there are no figures" in capsys.readouterr().err


@pytest.mark.slow
def test_known_numbers_of_the_eigenvalue_figure(tmp_path, few_samples):
    """The whole figure: ends of all trajectories, and how far theory and simulation are apart."""
    rows = {row.case: row for row in toy_dynamics.draw("eigenvalues", tmp_path)}
    ends = {
        "Euclidean, DirectPred": ((0.0477, 1e-4), (0.9901, 1e-4)),
        "Euclidean, IsoLoss": ((0.9901, 1e-4), (0.9901, 1e-4)),
        "Euclidean, no predictor": ((0.0200 * 0.0498, 1e-4), (2.2383 * 0.0498, 5e-4)),
        "Euclidean, no stop-gradient": ((0.0, 1e-6), (8e-5, 1e-5)),
        # of samples: other ones move the ends, and so may another machine's rounding
        "cosine, DirectPred": ((0.558, 0.03), (0.816, 0.01)),
        "cosine, IsoLoss": ((1.055, 0.01), (1.058, 0.01)),
        "cosine, no predictor": ((0.027, 0.003), (2.095, 0.03)),
        "cosine, no stop-gradient": ((0.0, 1e-3), (4.1, 0.25)),
    }
    for case, wanted in ends.items():
        for value, (number, tolerance) in zip(rows[case].simulated, wanted, strict=True):
            assert value == pytest.approx(number, abs=tolerance), case
    # finite steps; what the deployed discretisation is known to deviate
    largest = {"DirectPred": 1.3e-2, "IsoLoss": 8e-3, "no predictor": 2e-3, "no stop-gradient": 5.2e-2}
    for title, bound in largest.items():
        assert bound / 2 < rows[f"Euclidean, {title}"].deviation < bound
    # without noise the cosine theory is exact, with it modes are lost in another order
    for title in ("DirectPred", "IsoLoss", "no stop-gradient"):
        assert rows[f"cosine, {title}, σ = 0"].deviation < 0.02
    assert rows["cosine, no stop-gradient"].deviation > 0.1


@pytest.mark.slow
def test_known_numbers_of_weight_decay_and_growth(tmp_path, few_samples):
    """A third of the steps is enough for the remaining modes to converge."""
    rows = {row.case: row for row in toy_dynamics.draw("weight_decay", tmp_path, fraction=0.34)}
    for rule, wanted in (("DirectPred", (0.8772, 0.7120)), ("IsoLoss", (0.8911, 0.7921, 0.6931))):
        for decay, value in zip((0.1, 0.2, 0.3), wanted, strict=False):
            assert rows[f"{rule}, γ = {decay}"].simulated[1] == pytest.approx(value, abs=1e-3)
    assert rows["DirectPred, γ = 0.3"].simulated[1] < 1e-2
    assert all(row.simulated[0] < 0.02 for case, row in rows.items() if "DirectPred" in case)
    assert rows["IsoLoss, γ = 0.3"].simulated[0] == pytest.approx(0.6931, abs=1e-3)
    rows = {row.case: row for row in toy_dynamics.draw("early_growth", tmp_path, fraction=0.1)}
    for case, (low, high) in {
        "cosine, DirectPred, α = 1": (0.0055, 0.065),
        "cosine, IsoLoss, α = 1": (0.189, 0.277),
        "cosine, DirectPred, α = 0.5": (0.042, 0.083),
        "cosine, IsoLoss, α = 0.5": (0.134, 0.295),
        "Euclidean, DirectPred, α = 0.5": (0.245, 0.491),
        "Euclidean, IsoLoss, α = 0.5": (0.77, 1.68),
    }.items():
        row = rows[f"{case}: four smallest modes"]
        assert row.simulated == pytest.approx((low, high), rel=0.1), case


@pytest.mark.slow
def test_known_numbers_of_two_neurons(tmp_path, few_samples):
    rows = {row.case: row for row in toy_dynamics.draw("two_neurons", tmp_path)}
    small, other = toy_dynamics.starts(2, 6, 0.25, 0.5)
    for start, weight, drift in ((1, small, 1.2), (2, 2 * small, 1.02), (3, other, 1.02)):
        begin = gram_eigenvalues(weight)
        assert rows[f"Euclidean, DirectPred, start {start}"].simulated == pytest.approx((0.9901, 0.9901), abs=1e-3)
        # The gradient is orthogonal to W (DirectPred), to the gradient of the convex tr (W W^T)^2 (IsoLoss): no step of
        # any sample makes the sum of the λ, or of their squares, smaller; finite steps make it larger, the more so the
        # smaller λ is. How much depends on the samples and, as neighbouring paths part, on the last bit of a product.
        for rule, power in (("DirectPred", 1), ("IsoLoss", 2)):
            end = np.array(rows[f"cosine, {rule}, start {start}"].simulated)
            assert 1 - 1e-9 <= ((end**power).mean() / (begin**power).mean()) ** (1 / power) < drift
            assert end.max() / end.min() < 1.05, "the two have become one"
