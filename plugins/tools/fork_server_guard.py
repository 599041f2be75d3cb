"""Let a fork server outlive its clients. It imports this module first; in other processes the import has no effect.

* A client can be killed, or interrupted from a terminal, between its connection to the fork server and its request.
  Python's fork server then ends with ``EOFError``, and its other clients cannot start a process. If the client ends
  after the request, the new process prints the traceback of an incomplete pickle. Here such requests are dropped.
* A terminal sends SIGINT to the fork server too, which ignores it only after its imports. Here it ignores it from this
  import on, a tenth of a second after its start.
"""

import errno
import pickle
import signal
import sys
from multiprocessing import forkserver, reduction, spawn
from socket import socket
from typing import Any

_receive: Any = reduction.recvfds
_main: Any = spawn._main
_on_interrupt: Any = signal.getsignal(signal.SIGINT)


def _receive_or_drop(connection: socket, size: int) -> list[int]:
    """Receive the file descriptors of a request. The fork server continues after ECONNABORTED."""
    try:
        return _receive(connection, size)
    except (EOFError, ConnectionError):
        raise OSError(errno.ECONNABORTED, "the client ended before its request") from None


def _run_or_drop(*arguments: Any) -> int:
    """Run the process that the client describes, without the changes to the fork server; return its exit status."""
    reduction.recvfds, spawn._main = _receive, _main
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        return _main(*arguments)
    except (EOFError, pickle.UnpicklingError) as error:
        if _depth(error) > 2:  # raised by code that the description calls or imports
            raise
        return 1


def _depth(error: BaseException) -> int:
    """Return the number of frames of the traceback."""
    depth, trace = 0, error.__traceback__
    while trace is not None:
        depth, trace = depth + 1, trace.tb_next
    return depth


# A process of the fork server has the same ``orig_argv``, and a file descriptor by which the server sees it alive.
_server: Any = forkserver._forkserver
if _server._forkserver_alive_fd is None and any(
    word.startswith("from multiprocessing.forkserver import main") for word in sys.orig_argv
):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reduction.recvfds, spawn._main = _receive_or_drop, _run_or_drop
