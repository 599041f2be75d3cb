"""Processes of a run: one run per folder, no orphans, and a clear end when the run is told to stop."""

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from plugins.tools.command import UserError, say

_PR_SET_PDEATHSIG = 1
LOCK = ".lock"
"""The file in a run's folder that a running command holds locked."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder of a run for the length of the ``with`` block; a second run in it is an error.

    The operating system releases the lock when the process ends, also after SIGKILL. On a file system without locks the
    block runs unlocked.

    Args:
        folder: the run's folder; created if it does not exist.

    Raises:
        UserError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        _lock(file, folder)
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        who = f" (process {owner})" if owner else ""
        raise UserError(
            f"another run{who} writes into {folder}; wait until it has ended, or give this run another folder"
        ) from None
    except OSError:
        return  # no locks on this file system
    with suppress(OSError):  # a full disk: the number is for the message of others alone
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, however the parent dies.

    Call it at the start of a child process. Other systems have no such call; there the function does nothing.

    Args:
        parent: process number of the parent, as the parent read it. If the parent has ended already, this process ends
            at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


class Stopped(BaseException):
    """The run was told to stop. A BaseException, so that no handler for errors takes it for one.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status by the convention of shells: 128 + the signal's number."""
        return 128 + self.number


def _stop(number: int, frame: Any) -> None:
    raise Stopped(number)


@contextmanager
def exit_when_stopped(advice: str) -> Iterator[None]:
    """Turn SIGTERM and SIGINT within the block into one line and exit status 143 or 130.

    Args:
        advice: how to go on with the run, for the line.
    """
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except Stopped as stopped:
        say(f"stopped by {signal.Signals(stopped.number).name} before the end; {advice}")
        raise SystemExit(stopped.status) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
