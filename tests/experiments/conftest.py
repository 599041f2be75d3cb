"""Fixtures of the tests of the suites."""

import os
import runpy
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

import pytest

from plugins.experiments import run as experiments
from plugins.experiments import warm

ROOT = Path(__file__).parents[2]


@pytest.fixture
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test in the checkout, whose configs/ the suites look for."""
    monkeypatch.chdir(ROOT)


def _forked(arguments: Sequence[str]) -> int:
    """Run ``python -m MODULE …`` in a fork of this process, which has imported torch, and return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.argv = list(arguments[1:])
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            warnings.simplefilter("ignore", RuntimeWarning)  # of runpy, if this process has imported the module
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def few_digits_here(all_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """few_digits_here(train) makes tmp_path a folder for suites: our YAML, ``train`` and ``val`` digits a class.

    The report of the suite is made in a fork of this process.
    """

    def make(train: int, val: int = 5) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.setattr(experiments, "_call", _forked)
        left = {"train": train, "val": val}

        def further(folder: str, names: Sequence[str]) -> list[str]:
            images = sorted(name for name in names if name.endswith(".png"))
            return images[left.get(Path(folder).parent.name, len(images)) :]

        shutil.copytree(all_digits, "datasets/digits", ignore=further)

    return make


@pytest.fixture
def preload(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """preload(framework, …) → the commands of a suite are forked from a process that has imported these frameworks."""
    modules = {
        "solo": warm.PRELOADED,
        "lightly": ("lightly_ext.benchmarks.run", "lightly_ext.lightning.module"),
        "vissl": ("vissl_ext.checks", "vissl_ext.compose", "vissl_ext.ranks"),
    }

    def choose(*frameworks: str) -> None:
        monkeypatch.setattr(warm, "PRELOADED", tuple(name for each in frameworks for name in modules[each]))
        monkeypatch.setattr(warm, "_SERVER", forkserver.ForkServer())

    return choose
