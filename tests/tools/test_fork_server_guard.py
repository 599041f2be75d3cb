"""A client that ends during its request leaves the fork server, and the console, as they were."""

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

from plugins.tools.process import GUARD, started_by

ROOT = Path(__file__).parents[2]


def _status(server: forkserver.ForkServer, description: bytes) -> int:
    """Ask for a process, write this as its description, and return its exit status."""
    answer, request = server.connect_to_new_process([])
    os.write(request, description)
    os.close(request)
    try:
        assert forkserver.read_signed(answer) > 0
        return forkserver.read_signed(answer)
    finally:
        os.close(answer)


class _Unreadable:
    """Its description reads an empty file, which raises EOFError in the new process."""

    def __reduce__(self) -> tuple:
        return eval, ("__import__('gzip').decompress(b'\\x1f\\x8b')",)


def test_requests_of_clients_that_end_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    server = forkserver.ForkServer()
    server.set_forkserver_preload([GUARD])
    server.ensure_running()
    pid = server._forkserver_pid
    with socket.socket(socket.AF_UNIX) as client:  # the client ends between the connection and the request
        client.connect(server._forkserver_address)
    first = pickle.dumps({})
    for description in (b"", first[:-1], first, first + pickle.dumps([1000])[:-4]):
        assert _status(server, description) == 1
    with started_by(server):
        process = multiprocessing.get_context("forkserver").Process(target=os._exit, args=(7,))
        process.start()
    process.join()
    assert process.exitcode == 7
    assert capfd.readouterr() == ("", "")
    # an error of what a complete request calls is shown
    assert _status(server, first + pickle.dumps(_Unreadable())) == 1
    shown = capfd.readouterr()
    assert shown.out == "" and shown.err.startswith("Traceback") and "\nEOFError" in shown.err
    assert server._forkserver_pid == pid


def _run(program: str, folder: Path) -> tuple[str, str]:
    """Run a program, with SIGINT as in a terminal; return its output and its errors."""
    (folder / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    done = subprocess.run(
        [sys.executable, "program.py"],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for a background job
    )
    return done.stdout, done.stderr


INTERRUPTED = """
import multiprocessing, os, signal, time
from multiprocessing import forkserver
from pathlib import Path
from plugins.tools.process import GUARD, started_by

if __name__ == "__main__":
    server = forkserver.ForkServer()
    server.set_forkserver_preload([GUARD, "slow_to_import"])
    server.ensure_running()
    while not Path("begun").exists():
        time.sleep(0.01)
    os.kill(server._forkserver_pid, signal.SIGINT)
    with started_by(server):
        create = multiprocessing.get_context("forkserver").Process
        process = create(target=signal.raise_signal, args=(signal.SIGINT,))
        process.start()
    process.join()
    print("exit status", process.exitcode)
"""


def test_an_interrupt_ends_the_processes_but_not_the_fork_server(tmp_path: Path) -> None:
    """Nor during its imports. A new process has Python's handler, which raises KeyboardInterrupt."""
    (tmp_path / "slow_to_import.py").write_text("import time\nopen('begun', 'w').close()\ntime.sleep(0.3)\n")
    out, errors = _run(INTERRUPTED, tmp_path)
    assert out == "exit status 1\n", errors
    assert errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")


ELSEWHERE = """
import multiprocessing, signal
from importlib import import_module
from multiprocessing import forkserver, reduction, spawn
from plugins.tools.process import GUARD, started_by


def check(load):
    if load:
        import_module(GUARD)
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    own = all(part.__module__.startswith("multiprocessing.") for part in (reduction.recvfds, spawn._main))
    raise SystemExit(7 if heeded and own else 1)


if __name__ == "__main__":
    for modules, load in (([GUARD], False), (["zipfile"], True)):
        server = forkserver.ForkServer()
        server.set_forkserver_preload(modules)
        with started_by(server):
            process = multiprocessing.get_context("forkserver").Process(target=check, args=(load,))
            process.start()
        process.join()
        print(process.exitcode)
    try:
        check(True)
    except SystemExit as end:
        print(end.code)
"""


def test_other_processes_are_not_changed(tmp_path: Path) -> None:
    """A process of a server with the guard; one of a server without it that imports it; one of no server."""
    assert _run(ELSEWHERE, tmp_path) == ("7\n7\n7\n", "")
