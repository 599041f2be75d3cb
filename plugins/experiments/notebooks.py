"""Run the notebooks of docs/notebooks and write their .ipynb: ``python -m plugins.experiments.notebooks``.

The source of each notebook is ``NAME.py`` in the same folder (jupytext's percent format); edit that file. The command
needs the extra ``docs``.
"""

import argparse
import asyncio
import os
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "DISSL_WEIGHTS": "",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}
"""Environment of the kernel: this checkout, one thread, no published weights, no warning of tqdm about widgets."""


def read(name: str) -> Any:
    """Read the notebook of docs/notebooks/NAME.py, without outputs and with reproducible cell ids."""
    import jupytext

    notebook = jupytext.read(FOLDER / f"{name}.py")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for index, cell in enumerate(notebook.cells):
        cell["id"], cell["metadata"] = f"cell-{index}", {}
    return notebook


def _wait(step: Awaitable[None]) -> None:
    async def wait() -> None:
        await step

    asyncio.run(wait())


@contextmanager
def kernel() -> Iterator[Any]:
    """Start a kernel that several notebooks share, so that torch is imported once."""
    from jupyter_client.manager import AsyncKernelManager

    with tempfile.TemporaryDirectory() as folder:
        manager = AsyncKernelManager(kernel_name="python3")
        _wait(manager.start_kernel(env={**os.environ, **ENVIRONMENT, "IPYTHONDIR": folder}, cwd=folder))
        try:
            yield manager
        finally:
            _wait(manager.shutdown_kernel(now=True))


def execute(notebook: Any, manager: Any, *, timeout: float = 600) -> None:
    """Run a notebook in an empty namespace and store the outputs in it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    import nbclient
    import nbformat

    reset = nbformat.v4.new_code_cell("%reset -f")
    notebook.cells.insert(0, reset)
    nbclient.NotebookClient(notebook, km=manager, timeout=timeout, record_timing=False).execute()
    del notebook.cells[0]
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number


def main(argv: Sequence[str] | None = None) -> None:
    """Run notebooks and write them with their outputs."""
    import nbformat

    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser = argparse.ArgumentParser(prog="python -m plugins.experiments.notebooks", description=main.__doc__)
    parser.add_argument("notebook", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names)}")
    chosen = parser.parse_args(argv).notebook or names
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"unknown notebook {', '.join(unknown)}; the notebooks are {', '.join(names)}")
    with kernel() as manager:
        for name in chosen:
            notebook = read(name)
            execute(notebook, manager)
            nbformat.write(notebook, FOLDER / f"{name}.ipynb")
            print(FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
