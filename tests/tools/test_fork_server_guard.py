"""A client that ends during its request leaves the fork server, and the console, as they were."""

import multiprocessing
import os
import pickle
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
    assert server._forkserver_pid == pid
    assert capfd.readouterr() == ("", "")


def test_an_interrupt_does_not_end_the_fork_server_but_its_processes(tmp_path: Path) -> None:
    """Nor during its imports. A new process has Python's handler, which raises KeyboardInterrupt."""
    (tmp_path / "slow_to_import.py").write_text("import os, time\nopen('begun', 'w').close()\ntime.sleep(0.3)\n")
    program = (
        "import multiprocessing, os, signal, sys, time\n"
        "from multiprocessing import forkserver\n"
        "from pathlib import Path\n"
        "from plugins.tools.process import GUARD, started_by\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell ignores it for a background job
        "server = forkserver.ForkServer()\n"
        "server.set_forkserver_preload([GUARD, 'slow_to_import'])\n"
        "server.ensure_running()\n"
        "while not Path('begun').exists(): time.sleep(0.01)\n"
        "os.kill(server._forkserver_pid, signal.SIGINT)\n"
        "with started_by(server):\n"
        "    create = multiprocessing.get_context('forkserver').Process\n"
        "    process = create(target=signal.raise_signal, args=(signal.SIGINT,))\n"
        "    process.start()\n"
        "process.join()\n"
        "print('exit status', process.exitcode)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "exit status 1\n", done.stderr
    assert done.stderr.count("Traceback") == 1 and done.stderr.endswith("KeyboardInterrupt\n")
