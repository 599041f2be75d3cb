"""A run's folder belongs to one launcher at a time, and its processes end with it."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import IO

from plugins.tools.process import LOCK, hold_folder

_held: list[IO[str]] = []  # for the length of the process


def lock(folder: Path, node: int) -> None:
    """Keep other launchers out of a folder until this process ends, however it does.

    Args:
        folder: of the run.
        node: number of this machine; those of a training share the folder.

    Raises:
        UserError: another launcher has it.
        OSError: the folder cannot be written to.
    """
    _held.append(hold_folder(folder, f"{LOCK}-{node}" if node else LOCK))


def end_with_parent() -> None:
    """Let this process be killed as soon as the one that started it is gone, whatever that one could still do.

    The kernel's way, ``plugins.tools.process.end_with_parent``, does not serve here: the parent of a process that
    multiprocessing starts through a fork server is that server.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
