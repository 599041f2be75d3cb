"""The suite ``toy_dynamics``: figures of the linear toy model, theory and simulation."""

from pathlib import Path
from typing import Any

from plugins.experiments.suites import Request, Run, Step
from plugins.tools.records import read_json

FIGURES = ("eigenvalues", "weight_decay", "early_growth", "two_neurons")
"""The figures of :mod:`plugins.experiments.toy_dynamics`."""


def toy_dynamics(request: Request) -> list[Run]:
    """List a run for each figure."""
    return [_figure_run(name, request.out / "toy_dynamics") for name in FIGURES]


def _figure_run(name: str, results: Path) -> Run:
    def collect(run: Run) -> dict[str, Any]:
        rows = read_json(results / f"{name}.json")
        return {"largest_deviation": max(row["deviation"] for row in rows), "rows": rows}

    return Run(
        framework="numpy",
        method=name,
        dataset="toy",
        seed=2,
        folder=results / "numpy" / name / "seed2",
        steps=(Step("draw", ("-m", "plugins.experiments.toy_dynamics", name, "--out", str(results))),),
        collect=collect,
    )
