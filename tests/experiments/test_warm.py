"""A forked command behaves like one that ``python`` starts."""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing import forkserver

import pytest

from plugins.experiments import warm

PROGRAM = """
import multiprocessing, os, sys, time
print("start method", multiprocessing.get_start_method())
own = os.getsid(0) == os.getpid()
print("argv", sys.argv[1:], "name", __name__, "threads", os.environ["OMP_NUM_THREADS"], "session", own)
print("preloaded", "colorsys" in sys.modules)
print("to stderr", file=sys.stderr)
if "sleep" in sys.argv:
    time.sleep(1000)
if "raise" in sys.argv:
    raise RuntimeError("on purpose")
sys.exit(7 if "seven" in sys.argv else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "program_of_the_test.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warm, "PRELOADED", ("colorsys",))
    monkeypatch.setattr(warm, "_SERVER", forkserver.ForkServer())

    def start(*arguments):
        with (tmp_path / "log").open("ab") as log:
            return warm.WarmProcess(["-m", "program_of_the_test", *arguments], log, {"OMP_NUM_THREADS": "1"})

    return start


def test_arguments_output_and_status(run, tmp_path):
    process = run("a", "b=c d")
    assert process.wait(300) == 0 == process.poll()
    text = (tmp_path / "log").read_text()
    assert "argv ['a', 'b=c d'] name __main__ threads 1 session True" in text and "to stderr" in text
    assert f"start method {multiprocessing.get_start_method()}" in text
    assert run("seven").wait(300) == 7
    assert run("raise").wait(300) == 1
    assert "RuntimeError: on purpose" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_fork_server_that_was_killed_is_started_again(run, when, monkeypatch):
    assert run().wait(300) == 0
    server = warm._SERVER
    old, connect = server._forkserver_pid, server.connect_to_new_process

    def broken(files):
        monkeypatch.setattr(server, "connect_to_new_process", connect)
        os.kill(old, signal.SIGKILL)
        raise EOFError("unexpected EOF")

    if when == "before":
        os.kill(old, signal.SIGKILL)
    else:
        monkeypatch.setattr(server, "connect_to_new_process", broken)
    assert run("seven").wait(300) == 7
    assert server._forkserver_pid != old


def test_it_can_be_killed_with_its_group(run):
    process = run("sleep")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            break
        except ProcessLookupError:
            time.sleep(0.05)
    assert process.wait(300) == -signal.SIGKILL


def test_modules_are_preloaded_beside_a_fork_server_of_other_code(run, tmp_path):
    """The fork server of ``multiprocessing`` keeps the modules that it started with."""
    other = multiprocessing.get_context("forkserver").Process(target=os.getpid)
    other.start()
    other.join(300)
    assert run().wait(300) == 0
    assert "preloaded True" in (tmp_path / "log").read_text()


def test_only_modules_are_run(tmp_path):
    with (tmp_path / "log").open("ab") as log, pytest.raises(ValueError, match="got '-c'"):
        warm.WarmProcess(["-c", "pass"], log, {})


def test_the_caller_keeps_its_environment(run):
    before = dict(os.environ)
    run().wait(300)
    assert dict(os.environ) == before and sys.argv[0] != "program_of_the_test"
