"""Starts ``python -m MODULE …`` without importing torch and a framework anew each time.

A suite runs dozens of short commands, and importing what they need takes each of them ten seconds of a core. So one
process imports it once, and each command is forked from it (``multiprocessing``'s fork server). The command sees what
it would see on its own: its arguments, ``__main__``, its output in a log, a process group of its own.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

PRELOADED = (
    "torch",
    "hydra",
    "solo_ext.backbones",
    "solo_ext.config",
    "solo_ext.logs",
    "solo_ext.registry",
)
"""Modules that the fork server imports; one that is missing is left to the command, which then says so."""

_ADVICE = "ignore::FutureWarning:solo.utils.whitening"
"""solo-learn's import on a new PyTorch, which would be told to the console of the suite."""


class WarmProcess:
    """A command that runs in a fork; has of ``subprocess.Popen`` what a suite needs.

    Args:
        arguments: of ``python``, beginning with ``-m MODULE``.
        log: a file open for appending; standard output and error go there.
        environment: variables that are set before anything is imported; those of the first call hold for the imports.
    """

    def __init__(self, arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
        flag, module, *rest = arguments
        if flag != "-m":
            raise ValueError(f"a warm process runs a module with -m, got {flag!r}")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED])
        asked = os.environ.get("PYTHONWARNINGS")
        environment = {**environment, "PYTHONWARNINGS": f"{_ADVICE},{asked}" if asked else _ADVICE}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._process = context.Process(target=_run, args=(module, rest, log.name, dict(environment), os.getcwd()))
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)

    @property
    def pid(self) -> int:
        """Its process, and its process group."""
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same, asked anew."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end.

        Raises:
            TimeoutError: it still runs.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs")
        return self._process.exitcode


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str], folder: str) -> Any:
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with Path(log).open("ab") as out, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    # the fork server hands down its own way of starting processes: each worker of a data loader would import it all
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [module, *arguments]
    sys.path[0] = folder
    runpy.run_module(module, run_name="__main__", alter_sys=True)
