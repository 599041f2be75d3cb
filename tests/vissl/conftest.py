"""Digits and runs of the launcher that the VISSL tests share."""

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import vissl_ext  # noqa: F401 - patches VISSL before a test imports it

collect_ignore = ["in_ranks", "runner.py", "upstream.py"]  # not tests; the search for doctests would import them
ROOT = Path(__file__).parents[2]
_PAGE = (ROOT / "docs" / "vissl_stock.md").read_text()
_COMMON = re.findall(r"^    (config\S+)$", _PAGE, re.MULTILINE)
_SHORT = {name: re.search(rf"\b{name}\s+for\s+`([\w.]+)`", _PAGE).group(1) for name in ("SMALL", "LR", "NCE")}
_ROWS = {
    method: (config, [re.sub(r"^(SMALL|LR|NCE)\b", lambda m: _SHORT[m[1]], word) for word in overrides.split()])
    for method, config, overrides in re.findall(
        r"^\| ([^|]+?) \| (pretrain/\S+) \| ([^|]*=[^|]*) \|$", _PAGE, re.MULTILINE
    )
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument ``stock`` runs for each method of docs/vissl_stock.md that has a command."""
    if "stock" in metafunc.fixturenames:
        metafunc.parametrize("stock", _ROWS)


@pytest.fixture(scope="session")
def few_digits(thin_digits: Callable[[int, int], Path]) -> Path:
    """The real digits, thinned out: 96 training and 40 validation images."""
    return thin_digits(96, 40)


@pytest.fixture(scope="session")
def stock_commands(few_digits: Path) -> dict[str, Callable[[Path, int], list[str]]]:
    """Method → (the run's folder, epochs) → the command of docs/vissl_stock.md, on the thinned digits."""

    def command(method: str, folder: Path, epochs: int) -> list[str]:
        config, overrides = _ROWS[method]
        words = [f"config={config}", *_COMMON, *overrides, f"config.CHECKPOINT.DIR={folder}"]
        words = [word.replace("datasets/digits", str(few_digits)) for word in words]
        return [word.replace("num_epochs=1", f"num_epochs={epochs}") for word in words]

    return {method: partial(command, method) for method in _ROWS}


@pytest.fixture(scope="session")
def on() -> Callable[..., list[str]]:
    """on(device, count=1) → the launcher's overrides; skips where there are fewer GPUs than that."""

    def overrides(device: str, count: int = 1) -> list[str]:
        if device == "cpu":
            return ["config.MACHINE.DEVICE=cpu", "config.DISTRIBUTED.BACKEND=gloo"]
        found = torch.cuda.device_count()
        if found < count:
            pytest.skip(f"NOT TESTED on a GPU: this needs {count}, there are {found}")
        return ["config.MACHINE.DEVICE=gpu", "config.DISTRIBUTED.BACKEND=nccl"]

    return overrides


def _fresh(job: dict[str, Any]) -> dict[str, Any]:
    """Return the result of a command in a separate interpreter."""
    process = subprocess.run(
        [sys.executable, "-P", "-m", "vissl_ext.launch", *job["argv"]],
        cwd=job["folder"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return {"status": process.returncode, "output": process.stdout, "left": False}


@pytest.fixture(scope="session")
def launches() -> Iterator[Callable[[list[dict[str, Any]]], list[dict[str, Any]]]]:
    """launches(jobs) → their results, from one process that has imported VISSL once; see runner.py."""
    runner: list[subprocess.Popen] = []

    def run(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not runner:
            runner.append(
                subprocess.Popen(
                    [sys.executable, "-P", str(Path(__file__).with_name("runner.py"))],
                    env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        results = []
        for job in jobs:
            if "config.MACHINE.DEVICE=gpu" in job["argv"]:  # CUDA does not work after a fork
                results.append(_fresh(job))
                continue
            runner[0].stdin.write(json.dumps(job) + "\n")
            runner[0].stdin.flush()
            results.append(json.loads(runner[0].stdout.readline()))
        return results

    yield run
    for process in runner:
        process.communicate(timeout=60)


@pytest.fixture(scope="session")
def watched() -> ModuleType:
    """in_ranks/watched.py, which ranks import too."""
    sys.path.append(str(Path(__file__).with_name("in_ranks")))  # with no test in it
    return importlib.import_module("watched")


@pytest.fixture(scope="session")
def toys(watched: ModuleType) -> ModuleType:
    """in_ranks/toys.py, whose method is there from then on."""
    module = importlib.import_module("toys")
    module.install()
    return module


@pytest.fixture(scope="session")
def launch(few_digits: Path, launches: Callable) -> Callable[..., str]:
    """launch(*overrides) → what the launcher printed, where datasets/digits are the thinned digits; it ended well."""

    def run(*overrides: str) -> str:
        (result,) = launches([{"argv": overrides, "folder": str(few_digits.parents[1])}])
        assert result["status"] == 0, result["output"][-6000:]
        return result["output"]

    return run
