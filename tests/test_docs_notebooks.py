"""The notebooks: text and notebook agree, and every notebook runs."""

import json

import pytest

from plugins.experiments import notebooks

NAMES = ("first_steps", "minimal_cissl", "minimal_dissl", "pretrained_weights")
# Of the extra "docs", which ./run_experiments.sh installs.
jupytext = pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def _lines(notebook):
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] == "stream" and output["name"] == "stdout" for output in outputs), outputs
    return "".join("".join(output["text"]) for output in outputs).splitlines()


def test_notebooks_are_these():
    for ending in ("py", "ipynb"):
        assert {path.stem for path in notebooks.FOLDER.glob(f"*.{ending}")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_that_of_its_text(name):
    stored = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in stored["cells"]]
    wanted = [(cell["cell_type"], cell["source"]) for cell in notebooks.read(name).cells]
    assert cells == wanted, f"run: python -m plugins.experiments.notebooks {name}"
    assert "%" in _lines(stored)[-1]


@pytest.fixture(scope="module")
def kernel():
    with notebooks.kernel() as manager:
        yield manager


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_learns(kernel, name):
    """Each ends with an assertion on what it learned; printed are the same lines as in the stored notebook."""
    notebook = notebooks.read(name)
    notebooks.execute(notebook, kernel, timeout=300)
    stored = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())
    assert len(_lines(notebook)) == len(_lines(stored))
