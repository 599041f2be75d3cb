"""Processes of a run: one run per folder, no orphans, and a clear end when the run is told to stop."""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from plugins.tools.command import UserError, first_process, say

_PR_SET_PDEATHSIG = 1
_FIRST = "SSL_PLUGINS_FIRST_PROCESS"
GRACE_SECONDS = 8.0
"""How long a run may take to end after SIGTERM or SIGINT; less than a scheduler waits before SIGKILL."""
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
    with hold_folder(folder):
        yield


def hold_folder(folder: Path, name: str = LOCK) -> IO[str]:
    """Lock the folder of a run until the returned file is closed or the process ends, also by SIGKILL.

    Closing another descriptor of the file in this process releases the lock too. Child processes do not inherit it.
    The temporary files that ``files.atomic`` leaves in a killed process are deleted.

    Args:
        folder: the run's folder; created if it does not exist.
        name: of the file to lock; machines that share the folder of one run lock a file each.

    Returns:
        The open file. Keep a reference to it.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / name).open("a+")
    try:
        _lock(file, folder)
    except UserError:
        file.close()
        raise
    if name == LOCK:  # other machines of the same run may be writing
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
    return file


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock would be inherited by the workers of a data loader
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # no locks on this file system
        file.seek(0)
        owner = file.read().strip()
        who = f" ({owner})" if owner else ""
        raise UserError(
            f"another run{who} writes into {folder}; wait until it has ended, or give this run another folder"
        ) from None
    with suppress(OSError):  # a full disk: the number is for the message of others alone
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
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


def listen() -> None:
    """Let SIGTERM and SIGINT raise :class:`Stopped` in this process; no-op outside of the main thread.

    Lightning replaces signal handlers when it starts to train, so a callback calls this function again. A process that
    does not speak for its run ends at once. A forked child, such as a data loader's worker, leaves SIGINT, which a
    terminal sends to all processes, to its parent.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    owner, received = os.getpid(), False

    def stop(number: int, frame: Any) -> None:
        nonlocal received
        if os.getpid() != owner and number == signal.SIGINT:
            return
        if os.getpid() != owner or not first_process():
            os._exit(128 + number)
        if not received:  # a scheduler, a terminal and a parent process may each send one
            received = True
            speak = _speakers[-1] if _speakers else _say_stopped
            threading.Thread(target=_end_in_time, args=(number, speak), daemon=True).start()
            raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def hide_dropped(kind: type[BaseException]) -> None:
    """Do not print exceptions of one kind that Python drops: it drops, and prints, what is raised within a finalizer.

    Args:
        kind: what a signal handler raises. The caller takes care that the process ends all the same.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, kind) else show(dropped)


def _say_stopped(number: int, advice: str = "") -> None:
    say(f"stopped by {signal.Signals(number).name} before the end{advice and '; '}{advice}")


_speakers: list[Callable[[int], None]] = []
"""What says the last line of a stopped run, of the open blocks of :func:`exit_when_stopped`; inner ones last."""


def _end_in_time(number: int, speak: Callable[[int], None]) -> None:
    """End this process if tidying up hangs, as it may when other processes of the run are gone."""
    time.sleep(GRACE_SECONDS)
    try:
        speak(number)
    finally:  # also if the advice cannot be made, as on a disk that is gone
        os._exit(128 + number)


@contextmanager
def exit_when_stopped(advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn SIGTERM and SIGINT within the block into one line and exit status 143 or 130.

    Args:
        advice: how to go on with the run, for the line; or what returns it then.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    saying, said, show = threading.Lock(), False, sys.unraisablehook

    def speak(number: int) -> None:
        nonlocal said
        text = advice if isinstance(advice, str) else advice()
        with saying:  # tidying up may end just when its time is over: one line, and a whole one
            if not said:
                _say_stopped(number, text)
            said = True

    _speakers.append(speak)
    hide_dropped(Stopped)  # _end_in_time ends such a run
    listen()
    try:
        yield
    except BaseException as error:
        stopped = _origin(error)
        if stopped is None or isinstance(error, SystemExit):  # of an inner block, which has spoken
            raise
        speak(stopped.number)
        raise SystemExit(stopped.status) from None
    finally:
        _speakers.remove(speak)
        sys.unraisablehook = show
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler)


def _origin(error: BaseException | None) -> Stopped | None:
    """The signal that an exception comes from, also where tidying up raised another exception."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def end_with_first_process() -> None:
    """Let the processes that Lightning starts end when the first one, which started them, ends, however it ends."""
    if first_process():
        os.environ[_FIRST] = str(os.getpid())
    elif os.environ.get(_FIRST) == str(os.getppid()):
        end_with_parent(os.getppid())
