"""Simulate the eigenvalue dynamics of the linear toy model: ``python -m plugins.experiments.toy_dynamics``.

The theory is that of :mod:`plugins.experiments.theory`: differential equations for the eigenvalues λ of W Wᵀ. The
simulation is gradient descent on the matrix W. The Euclidean metric uses the exact expectation over the data, the
cosine metric 2048 new samples per step. The tests check every gradient against autograd. The cosine loss without
stop-gradient loses dimensions but conserves Σ λ; it does not diverge.

``eigenvalues``   λ over training: two metrics × DirectPred, IsoLoss, no predictor, no stop-gradient
``weight_decay``  with weight decay DirectPred loses every mode below a threshold, IsoLoss none
``early_growth``  initial growth rate of each mode: equal with IsoLoss, proportional to λ with DirectPred
``two_neurons``   trajectories of two eigenvalues from three starts

The command writes <figure>.pdf, <figure>.png and <figure>.json for each figure, and table.md for all.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from plugins.experiments.theory import (
    Rule,
    cosine_matrix_step,
    cosine_rate,
    euclidean_matrix_step,
    euclidean_rate,
    fixed_points,
    gram_eigenvalues,
    integrate,
)

NOISE = 0.1
"""σ of the augmentation."""
SAMPLES = 2048
TITLES: dict[Rule, str] = {
    "direct": "DirectPred",
    "iso": "IsoLoss",
    "no_predictor": "no predictor",
    "no_stop_gradient": "no stop-gradient",
}
INK, FAINT = "#222222", "#9a9a9a"


class Row(NamedTuple):
    """One line of the table.

    Args:
        figure, case: name of the figure, and metric and method of the trajectory.
        step, steps: learning rate and number of steps.
        simulated, theory: smallest and largest value at the end.
        deviation: largest difference of the two at any time, relative to the largest value of the theory at that time.
    """

    figure: str
    case: str
    step: float
    steps: int
    simulated: tuple[float, float]
    theory: tuple[float, float]
    deviation: float


def compare(
    figure: str, case: str, step: float, simulated: Float[ndarray, "T M"], theory: Float[ndarray, "T M"]
) -> Row:
    """Compare two trajectories of the same length, for the table."""
    error = np.abs(simulated - theory) / np.abs(theory).max(1, keepdims=True)
    ends = [(float(path[-1].min()), float(path[-1].max())) for path in (simulated, theory)]
    return Row(figure, case, step, len(theory) - 1, ends[0], ends[1], float(error.max()))


# ----------------------------------------------------------------------------------------------- starts and paths


def starts(outputs: int, inputs: int, *scales: float, seed: int = 2) -> list[Float[ndarray, "M K"]]:
    """Draw a Gaussian W for each scale, with torch in single precision."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(outputs, inputs, generator=generator) * scale).double().numpy() for scale in scales]


def simulate(
    weight: Float[ndarray, "M K"], steps: int, update: Callable[[Float[ndarray, "M K"]], Float[ndarray, "M K"]]
) -> Float[ndarray, "T M"]:
    """Compute the eigenvalues before and after each update of W."""
    points = [gram_eigenvalues(weight)]
    for _ in range(steps):
        weight = update(weight)
        points.append(gram_eigenvalues(weight))
    return np.stack(points)


def euclidean_paths(
    weight: Float[ndarray, "M K"], *, rule: Rule, step: float, steps: int, weight_decay: float = 0.0, finer: int = 20
) -> tuple[Float[ndarray, "T M"], Float[ndarray, "T M"]]:
    """Compute the simulated and the theoretical trajectory for the Euclidean metric.

    The theory is integrated with ``finer`` steps per step of the simulation.
    """
    options: dict[str, Any] = {"rule": rule, "noise": NOISE, "weight_decay": weight_decay}
    simulated = simulate(weight, steps, partial(euclidean_matrix_step, step=step, **options))
    fine = integrate(partial(euclidean_rate, **options), simulated[0], step=step / finer, steps=finer * steps)
    return simulated, fine[::finer]


def cosine_paths(
    weight: Float[ndarray, "M K"], *, rule: Rule, step: float, steps: int, noise: float = NOISE
) -> tuple[Float[ndarray, "T M"], Float[ndarray, "T M"]]:
    """Compute the simulated and the theoretical trajectory for the cosine metric.

    Both draw new samples in each step. The theory is that of σ → 0.
    """
    rng = np.random.default_rng(0)

    def update(weight: Float[ndarray, "M K"]) -> Float[ndarray, "M K"]:
        shape = (SAMPLES, weight.shape[1])
        x = rng.standard_normal(shape)
        first, second = (x + noise * rng.standard_normal(shape) if noise else x for _ in range(2))
        return cosine_matrix_step(weight, first, second, step=step, rule=rule)

    def rate(values: Float[ndarray, " M"]) -> Float[ndarray, " M"]:
        return cosine_rate(values, rng.standard_normal((SAMPLES, len(values))) ** 2, rule=rule)

    simulated = simulate(weight, steps, update)
    return simulated, integrate(rate, simulated[0], step=step, steps=steps)


# -------------------------------------------------------------------------------------------------------- figures


def eigenvalues(fraction: float) -> tuple[Any, list[Row]]:
    """Draw λ over training for ten modes; the learning rate is 0.1, or 0.01 where the Euclidean gradient is large."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    (weight,), steps = starts(10, 15, 0.25), _few(1499, fraction)
    figure, rows = _figure(11, 5.2), []
    grid = figure.subplots(2, len(TITLES), sharex=True)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(weight)))
    for line, metric in zip(grid, ("Euclidean", "cosine"), strict=True):
        for ax, (rule, title) in zip(line, TITLES.items(), strict=True):
            if metric == "Euclidean":
                step = 0.1 if rule == "no_predictor" else 0.01
                simulated, theory = euclidean_paths(weight, rule=rule, step=step, steps=steps)
                rows.append(compare("eigenvalues", f"{metric}, {title}", step, simulated, theory))
            else:
                step = 0.1
                simulated, theory = cosine_paths(weight, rule=rule, step=step, steps=steps)
                rows.append(compare("eigenvalues", f"{metric}, {title}", step, simulated, theory))
                if rule != "no_predictor":  # without noise its gradient is zero
                    clean = cosine_paths(weight, rule=rule, step=step, steps=steps, noise=0.0)
                    rows.append(compare("eigenvalues", f"{metric}, {title}, σ = 0", step, *clean))
            for mode, colour in enumerate(colours):
                ax.plot(simulated[:, mode], color=colour, lw=1.6)
                ax.plot(theory[:, mode], color=INK, lw=0.8, ls=(0, (4, 3)))
            ax.set_title(f"{metric}: {title}", loc="left")
            ax.text(0.98, 0.97, f"η = {step:g}", transform=ax.transAxes, ha="right", va="top", color=FAINT)
    for ax in grid[-1]:
        ax.set_xlabel("step")
    for ax in grid[:, 0]:
        ax.set_ylabel("eigenvalue λ of W Wᵀ")
    keys = [Line2D([], [], color=colours[5], lw=1.6), Line2D([], [], color=INK, lw=0.8, ls=(0, (4, 3)))]
    names = ["simulation: gradient descent on W, σ = 0.1", "theory: λ′(λ); for the cosine that of σ → 0"]
    figure.legend(keys, names, loc="outside lower center", ncols=2, frameon=False)
    return figure, rows


def weight_decay(fraction: float) -> tuple[Any, list[Row]]:
    """Draw λ at the end over λ at the start, and trajectories with γ = 0.2, for the Euclidean metric."""
    (weight,), steps, step = starts(10, 15, 0.25), _few(6000, fraction), 0.01
    figure, rows = _figure(11, 3.4), []
    time_axis, *ends = figure.subplots(1, 3)
    decays = {0.1: "#1f6fb4", 0.2: "#2c8c5a", 0.3: "#c8553d"}
    rules: tuple[Rule, Rule] = ("direct", "iso")
    for ax, rule in zip(ends, rules, strict=True):
        for decay, colour in decays.items():
            simulated, theory = euclidean_paths(weight, rule=rule, step=step, steps=steps, weight_decay=decay, finer=5)
            rows.append(compare("weight_decay", f"{TITLES[rule]}, γ = {decay}", step, simulated, theory))
            threshold, attractor = fixed_points(rule=rule, noise=NOISE, weight_decay=decay)
            if rule == "direct" and decay == 0.2:
                time_axis.plot(simulated, color=colour, lw=1.4)
                time_axis.plot(theory, color=INK, lw=0.8, ls=(0, (4, 3)))
                time_axis.axhline(threshold, color=FAINT, lw=1, ls=":")
            grid = np.geomspace(0.01, 3, 300)
            rate = partial(euclidean_rate, rule=rule, noise=NOISE, weight_decay=decay)
            ax.plot(grid, integrate(rate, grid, step=step, steps=steps)[-1], color=colour, lw=1)
            ax.plot(simulated[0], simulated[-1], "o", color=colour, ms=4.5, label=f"γ = {decay}, λ → {attractor:.3f}")
            if np.isfinite(threshold) and threshold > 0:
                ax.axvline(threshold, color=colour, lw=1, ls=":")
        ax.set_xscale("log")
        ax.set_xlabel("λ at the start")
        ax.set_title(f"{TITLES[rule]}: λ after {steps} steps", loc="left")
        ax.set_ylim(-0.05, 1.05)
        ax.legend(frameon=False, fontsize=7.5, loc="center right" if rule == "direct" else "lower right")
    time_axis.set_title("DirectPred, γ = 0.2; dotted: threshold", loc="left")
    time_axis.set_xlabel("step")
    time_axis.set_ylabel("eigenvalue λ of W Wᵀ")
    return figure, rows


def early_growth(fraction: float) -> tuple[Any, list[Row]]:
    """Draw d ln λ / dt at the start over λ, from the theory and from one small step on W."""
    (weight,), step = starts(10, 15, 0.25), 1e-3
    samples = _few(200_000, fraction)
    rng = np.random.default_rng(0)
    x, squares = rng.standard_normal((samples, 15)), rng.standard_normal((samples, 10)) ** 2
    values = gram_eigenvalues(weight)
    figure, rows = _figure(8, 3.4), []
    styles: dict[tuple[Rule, float], str] = {
        ("direct", 1.0): "#c8553d",
        ("direct", 0.5): "#e0a08f",
        ("iso", 1.0): "#1f6fb4",
        ("iso", 0.5): "#8fb8d8",
    }
    axes = figure.subplots(1, 2)
    for ax, metric in zip(axes, ("Euclidean", "cosine"), strict=True):
        for (rule, alpha), colour in styles.items():
            if metric == "Euclidean":
                theory = euclidean_rate(values, rule=rule, alpha=alpha, noise=NOISE) / values
                moved = euclidean_matrix_step(weight, step=step, rule=rule, alpha=alpha, noise=NOISE)
            else:
                theory = cosine_rate(values, squares, rule=rule, alpha=alpha) / values
                moved = cosine_matrix_step(weight, x, x, step=step, rule=rule, alpha=alpha)
            simulated = np.log(gram_eigenvalues(moved) / values) / step
            case = f"{metric}, {TITLES[rule]}, α = {alpha:g}: four smallest modes"
            rows.append(compare("early_growth", case, step, simulated[None, :4], theory[None, :4])._replace(steps=1))
            ax.plot(values, theory, color=colour, lw=1.2, label=f"{TITLES[rule]}, α = {alpha:g}")
            ax.plot(values, simulated, "o", color=colour, ms=4)
        ax.axhline(0, color=FAINT, lw=0.8)
        ax.set_xscale("log")
        ax.set_xlabel("λ at the start")
        ax.set_title(f"{metric}: growth rate d ln λ / dt (dots: simulation)", loc="left")
        ax.legend(frameon=False, fontsize=7.5)
    return figure, rows


def two_neurons(fraction: float) -> tuple[Any, list[Row]]:
    """Draw the trajectories of two eigenvalues from three starts."""
    small, other = starts(2, 6, 0.25, 0.5)
    figure, rows, step = _figure(11, 3.2), [], 0.01
    cases: list[tuple[str, Rule]] = [(m, r) for m in ("Euclidean", "cosine") for r in ("direct", "iso")]
    steps = _few(1500, fraction)
    for ax, (metric, rule) in zip(figure.subplots(1, len(cases)), cases, strict=True):
        paths = euclidean_paths if metric == "Euclidean" else cosine_paths
        colours = {"#1f6fb4": small, "#2c8c5a": 2 * small, "#c8553d": other}
        for number, (colour, weight) in enumerate(colours.items(), 1):
            simulated, theory = paths(weight, rule=rule, step=step, steps=steps)
            rows.append(compare("two_neurons", f"{metric}, {TITLES[rule]}, start {number}", step, simulated, theory))
            ax.plot(*simulated.T, color=colour, lw=1.8)
            ax.plot(*theory.T, color=INK, lw=0.8, ls=(0, (4, 3)))
            ax.plot(*simulated[0], "o", color=colour, ms=5)
            ax.plot(*simulated[-1], "s", color=colour, ms=5)
        largest = max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([0, largest], [0, largest], color=FAINT, lw=0.8, ls=":", zorder=0)
        ax.set_title(f"{metric}: {TITLES[rule]}  (η = {step:g})", loc="left")
        ax.set_xlabel("smaller λ (square: end)")
    figure.axes[0].set_ylabel("larger λ")
    return figure, rows


FIGURES: dict[str, Callable[[float], tuple[Any, list[Row]]]] = {
    "eigenvalues": eigenvalues,
    "weight_decay": weight_decay,
    "early_growth": early_growth,
    "two_neurons": two_neurons,
}


def _few(count: int, fraction: float) -> int:
    return max(round(count * fraction), 2)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(name: str, out: Path, *, fraction: float = 1.0) -> list[Row]:
    """Compute and draw a figure, and write its PDF, PNG and JSON files.

    Args:
        name: a key of FIGURES.
        out: the folder to write into.
        fraction: fraction of the steps and samples to compute; 1 gives the complete figure.

    Returns:
        The rows of the table for this figure.
    """
    from matplotlib import rc_context

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "pdf.fonttype": 42,
    }
    with rc_context(style):
        figure, rows = FIGURES[name](fraction)
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / f"{name}.png", dpi=150)
        # without a date in the file, the same numbers give the same bytes
        figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
    (out / f"{name}.json").write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")
    return rows


# ---------------------------------------------------------------------------------------------------------- table


def make_table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = [
        "| figure | case | η | steps | simulation, at the end | theory, at the end | largest deviation |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ends = [f"{low:.4g} … {high:.4g}" for low, high in (row.simulated, row.theory)]
        cells = [row.figure, row.case, f"{row.step:g}", str(row.steps), *ends, f"{100 * row.deviation:.2g} %"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Smallest and largest eigenvalue of W Wᵀ (early_growth: growth rate). Deviation: largest difference at any",
        "time, relative to the largest value of the theory at that time. It is due to finite steps and samples. The",
        "theory of the cosine metric is that of σ → 0: the rows with σ = 0 show the effect of the noise on it.",
    ]
    return "\n".join(lines) + "\n"


def read_rows(out: Path) -> list[Row]:
    """Read the rows of all figures in a folder."""
    rows = []
    for name in FIGURES:
        file = out / f"{name}.json"
        for line in json.loads(file.read_text()) if file.is_file() else []:
            rows.append(Row(**{**line, "simulated": tuple(line["simulated"]), "theory": tuple(line["theory"])}))
    return rows


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.experiments.toy_dynamics",
        description="Compare theory and simulation of the linear toy model.",
    )
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"figures to draw: {', '.join(FIGURES)} (default: all)"
    )
    parser.add_argument("--out", type=Path, default=Path("results/toy_dynamics"), metavar="FOLDER")
    parser.add_argument(
        "--fraction", type=_fraction, default=1.0, help="fraction of the steps, for a quick trial (default: 1)"
    )
    parser.add_argument("--table", type=Path, metavar="FOLDER", help="only write table.md, from the figures in FOLDER")
    options = parser.parse_args(argv)
    for name in options.figures:
        if name not in FIGURES:
            parser.error(f"there is no figure {name!r}; choose from {', '.join(FIGURES)}")
    out = options.table or options.out
    if options.table is None:
        for name in options.figures or FIGURES:
            draw(name, out, fraction=options.fraction)
            print(f"written: {out / name}.png, {out / name}.pdf", flush=True)
    rows = read_rows(out)
    if not rows:
        print(f"error: there are no figures in {out}", file=sys.stderr)
        return 1
    table = make_table(rows)
    (out / "table.md").write_text(table)
    print(f"\n{table}\nwritten: {out / 'table.md'}" if options.table or not options.figures else f"{len(rows)} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
