"""Start ``python -m MODULE …`` without importing torch and the framework again for each command.

A suite runs dozens of short commands, and the imports take ten seconds of processor time or more. One process (a fork
server) imports the modules once, and each command is forked from it. A command has its own arguments, ``__main__``, log
file, session and process group, as if ``python`` had started it.
"""

import gc
import multiprocessing
import multiprocessing.context
import os
import runpy
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from plugins.tools.process import GUARD, started_by

PRELOADED = (
    "torch",
    "torch.utils.tensorboard",
    "hydra",
    "solo_ext.backbones",
    "solo_ext.config",
    "solo_ext.logs",
    "solo_ext.registry",
)
"""Modules that the fork server imports. A missing module is ignored here; the command that needs it reports it."""

_SERVER = forkserver.ForkServer()
"""The fork server of the suites; see ``started_by``."""

_FILTER = "ignore::FutureWarning:solo.utils.whitening"
"""Filter for a warning that importing solo-learn causes on a new PyTorch; it would appear on the suite's console."""


def start_server(environment: Mapping[str, str]) -> None:
    """Start the fork server, which imports ``PRELOADED`` in the background; no-op if it runs already.

    Args:
        environment: variables that are set before anything is imported.
    """
    with _changed_environment(environment):
        _SERVER.set_forkserver_preload([GUARD, *PRELOADED])
        _SERVER.ensure_running()


@contextmanager
def _changed_environment(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Set variables, and the filter of warnings, for the length of the ``with`` block."""
    given = os.environ.get("PYTHONWARNINGS")
    changed = {**environment, "PYTHONWARNINGS": f"{_FILTER},{given}" if given else _FILTER}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield changed
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class WarmProcess(multiprocessing.context.ForkServerProcess):
    """A command that runs in a fork, with those members of ``subprocess.Popen`` that a suite needs.

    Args:
        arguments: of ``python``, beginning with ``-m MODULE``.
        log: a file open for appending; receives standard output and error.
        environment: variables of the command. If the fork server does not run yet, it imports its modules with them.
    """

    def __init__(self, arguments: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
        flag, module, *rest = arguments
        if flag != "-m":
            raise ValueError(f"a warm process runs a module with -m, got {flag!r}")
        start_server(environment)
        with _changed_environment(environment) as changed:
            super().__init__(target=_run, args=(module, rest, log.name, changed, os.getcwd()))
            try:
                self.start()
            except (EOFError, ConnectionError):  # the fork server was killed, for example for lack of memory
                time.sleep(1)  # until the system reports its end: start() then starts another one
                self.start()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with started_by(_SERVER):
            return multiprocessing.context.ForkServerProcess._Popen(process_obj)

    @property
    def pid(self) -> int:
        """Number of the process, and of its process group."""
        return super().pid or 0

    @property
    def returncode(self) -> int | None:
        """Exit status; -N after signal N, None while the process runs."""
        return self.exitcode

    def poll(self) -> int | None:
        """Return the exit status, as ``returncode``."""
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process ends, and return its exit status.

        Raises:
            TimeoutError: the process still runs.
        """
        self.join(timeout)
        if self.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs")
        return self.exitcode


def _run(module: str, arguments: list[str], log: str, environment: dict[str, str], folder: str) -> Any:
    gc.freeze()  # VISSL collects garbage several times in each phase, and would traverse all objects of the imports
    os.setsid()
    os.chdir(folder)
    os.environ.update(environment)
    with Path(log).open("ab") as out, Path(os.devnull).open("rb") as empty:
        os.dup2(empty.fileno(), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    # restore the default start method: with the fork server's, each worker of a data loader would repeat the imports
    multiprocessing.set_start_method(None, force=True)
    sys.argv = [module, *arguments]
    sys.path[0] = folder
    runpy.run_module(module, run_name="__main__", alter_sys=True)
