"""A run's folder belongs to one launcher at a time, and its processes end with it."""

import errno
import multiprocessing
import os
import signal
import socket
import threading
from pathlib import Path

from plugins.tools.command import UserError


def lock(folder: Path, node: int) -> None:
    """Keep other launchers out of a folder until this process ends, however it does.

    Args:
        folder: of the run.
        node: number of this machine; those of a training share the folder.

    Raises:
        UserError: another launcher has it.
        OSError: the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    path = folder / (f".lock-{node}" if node else ".lock")
    # never closed: closing any descriptor of the file would give up the lock; the processes that we start do not get it
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        holder = os.read(descriptor, 1000).decode(errors="replace").strip()
        raise UserError(
            f"{folder} is in use by another launcher, {holder or 'which has just begun'}; wait for its end, or name "
            "another config.CHECKPOINT.DIR"
        ) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def end_with_parent() -> None:
    """Let this process be killed as soon as the one that started it is gone, whatever that one could still do."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
