"""Processes of a run: a lock per folder, no orphaned processes, and a defined exit after SIGTERM or SIGINT."""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from plugins.tools.command import UserError, first_process, print_on_rank_zero

_PR_SET_PDEATHSIG = 1
_FIRST = "SSL_PLUGINS_FIRST_PROCESS"
GRACE_SECONDS = 8.0
"""Seconds that a run may take to exit after SIGTERM or SIGINT; less than a scheduler waits before SIGKILL."""
GUARD = "plugins.tools.fork_server_guard"
"""The module that a fork server imports first; see there."""
LOCK = ".lock"
"""The file in a run's folder that a running command holds locked."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the folder of a run during the ``with`` block; a second run in the folder is an error.

    The operating system releases the lock when the process ends, also after SIGKILL. On a file system without locks the
    block runs unlocked.

    Args:
        folder: the run's folder; created if it does not exist.

    Raises:
        UserError: another process holds the lock.
    """
    with hold_folder(folder):
        yield


def hold_folder(folder: Path, name: str = LOCK) -> IO[str]:
    """Lock the folder of a run until the returned file is closed or the process ends, also by SIGKILL.

    Closing another descriptor of the file in this process releases the lock too. Child processes do not inherit it.
    The temporary files that ``files.atomic`` leaves in a killed process are deleted.

    Args:
        folder: the run's folder; created if it does not exist.
        name: name of the file to lock. If several machines run in the same folder, each locks a separate file.

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
    if name == LOCK:  # with another name, other machines of the same run may be writing their temporary files
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
            f"another run{who} writes into {folder}; wait until it has ended, or choose another folder for this run"
        ) from None
    with suppress(OSError):  # full disk: the text is only used in the error message of other processes
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def holder(folder: Path, name: str = LOCK) -> str | None:
    """Return who holds the lock of a folder, such as ``process 12 on node3``; None if nobody does.

    The lock is only queried, so that a command that starts at the same moment still gets it. On a file system without
    locks the result is None. A lock of this process itself is not seen.

    Args:
        folder: the run's folder.
        name: as for :func:`hold_folder`.
    """
    # struct flock: type, whence, start, length and process, in the order of the operating system
    layout, order = ("hhqqi0q", slice(0, 1)) if sys.platform.startswith("linux") else ("qqihh", slice(3, 4))
    values = (fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0) if order.start == 0 else (0, 0, 0, fcntl.F_WRLCK, os.SEEK_SET)
    try:
        with (folder / name).open() as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *values))
            (kind,) = struct.unpack(layout, answer)[order]
            return None if kind == fcntl.F_UNLCK else file.read().strip() or "another process"
    except OSError:
        return None


def end_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, however the parent dies.

    Call it at the start of a child process. On systems other than Linux the function does nothing.

    Args:
        parent: process id of the parent, read in the parent. If the parent has already exited, this process is killed
            immediately.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def started_by(server: forkserver.ForkServer) -> Iterator[None]:
    """Let a fork server of one's own start the processes of the ``with`` block whose start method is "forkserver".

    multiprocessing has one fork server. It keeps the modules that it imported when it started, and other code may have
    started it: a later ``multiprocessing.set_forkserver_preload`` has no effect then, and each process imports
    everything anew.

    Args:
        server: started by the first process; the caller has set its modules with ``set_forkserver_preload``, and GUARD
            is the first of them.
    """
    general = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = server.connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = general


class Stopped(BaseException):
    """Raised when the run receives SIGTERM or SIGINT. It is a BaseException, so that ``except Exception`` ignores it.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def status(self) -> int:
        """Return the exit status that shells use: 128 + the number of the signal."""
        return 128 + self.number


def install_signal_handlers() -> None:
    """Install handlers that raise :class:`Stopped` on SIGTERM and SIGINT; no-op outside of the main thread.

    Lightning replaces signal handlers when training starts, so a callback calls this function again. Processes of other
    ranks than 0 exit immediately. A forked child, such as a worker of a data loader, ignores SIGINT: a terminal sends
    it to all processes, and the parent handles it.
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
        if not received:  # a scheduler, a terminal and a parent process may each send a signal
            received = True
            report = _reporters[-1] if _reporters else _print_stopped
            threading.Thread(target=_end_in_time, args=(number, report), daemon=True).start()
            raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def hide_dropped(kind: type[BaseException]) -> None:
    """Do not print an exception of a given class that is raised in a finalizer, where Python ignores exceptions.

    Args:
        kind: the class that a signal handler raises. The caller must ensure that the process exits nevertheless.
    """
    show = sys.unraisablehook
    sys.unraisablehook = lambda dropped: None if isinstance(dropped.exc_value, kind) else show(dropped)


def _print_stopped(number: int, advice: str = "") -> None:
    print_on_rank_zero(f"stopped by {signal.Signals(number).name} before the end{advice and '; '}{advice}")


_reporters: list[Callable[[int], None]] = []
"""The functions that print the last line of a stopped run, one per open block of :func:`exit_when_stopped`, innermost
last."""


def _end_in_time(number: int, report: Callable[[int], None]) -> None:
    """Exit if the clean-up hangs, which happens if other processes of the run have already exited."""
    time.sleep(GRACE_SECONDS)
    try:
        report(number)
    finally:  # also if the advice function raises, for example because the disk is no longer available
        os._exit(128 + number)


@contextmanager
def exit_when_stopped(advice: str | Callable[[], str]) -> Iterator[None]:
    """On SIGTERM or SIGINT within the block, print one line and exit with status 143 or 130.

    Args:
        advice: how to resume the run, added to the line; or a function that returns this text, called at the end.
    """
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    lock, printed, show = threading.Lock(), False, sys.unraisablehook

    def report(number: int) -> None:
        nonlocal printed
        text = advice if isinstance(advice, str) else advice()
        with lock:  # the clean-up and _end_in_time may call this at the same moment: print one complete line
            if not printed:
                _print_stopped(number, text)
            printed = True

    _reporters.append(report)
    hide_dropped(Stopped)  # if a finalizer ignores the exception, _end_in_time exits
    install_signal_handlers()
    try:
        yield
    except BaseException as error:
        stopped = _origin(error)
        if stopped is None or isinstance(error, SystemExit):  # an inner block raises SystemExit after it has printed
            raise
        report(stopped.number)
        raise SystemExit(stopped.status) from None
    finally:
        _reporters.remove(report)
        sys.unraisablehook = show
        if threading.current_thread() is threading.main_thread():
            for number, handler in previous.items():
                signal.signal(number, handler)


def _origin(error: BaseException | None) -> Stopped | None:
    """Return the Stopped exception in the context chain of an exception, or None; clean-up code may raise others."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def end_with_first_process() -> None:
    """Kill the processes that Lightning starts when the first process, their parent, exits for any reason."""
    if first_process():
        os.environ[_FIRST] = str(os.getpid())
    elif os.environ.get(_FIRST) == str(os.getppid()):
        end_with_parent(os.getppid())
