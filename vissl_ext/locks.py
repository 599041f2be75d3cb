"""Lock of the folder of a run, and termination of its processes with the launcher."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import IO

from plugins.tools.process import LOCK, hold_folder

_held: list[IO[str]] = []  # locks that this process holds until it ends


def lock(folder: Path, node: int) -> None:
    """Lock the folder of a run against other launchers until this process ends.

    Args:
        folder: folder of the run.
        node: number of this machine. The machines of a run share the folder.

    Raises:
        UserError: another launcher holds the lock.
        OSError: the folder is not writable.
    """
    _held.append(hold_folder(folder, f"{LOCK}-{node}" if node else LOCK))


def end_with_parent() -> None:
    """Kill this process as soon as the process that started it has ended.

    ``plugins.tools.process.end_with_parent`` cannot be used here: if multiprocessing uses a fork server, the parent
    process for the kernel is that server.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()
