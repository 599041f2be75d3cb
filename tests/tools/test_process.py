"""One run per folder, no orphaned processes, and the exit status of a stopped run."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plugins.tools.command import UserError
from plugins.tools.process import end_with_parent, exit_when_stopped, holder, locked_folder


def _forked(body: Callable[[], None]) -> int:
    """Start ``body`` in a child process and return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        body()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        os._exit(status)


def _wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 600
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def hold() -> None:
        with locked_folder(tmp_path / "run"):
            ready.touch()
            time.sleep(1000)

    assert holder(tmp_path / "run") is None
    first = _forked(hold)
    _wait_until(ready.exists)
    assert (holder(tmp_path / "run") or "").startswith(f"process {first} on ")
    with (
        pytest.raises(UserError, match=rf"another run \(process {first} on [^)]+\) writes into .*run"),
        locked_folder(tmp_path / "run"),
    ):
        pass
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert holder(tmp_path / "run") is None
    with locked_folder(tmp_path / "run"):
        pass
    with locked_folder(tmp_path / "run"):  # released at the block's end
        pass


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    noted = tmp_path / "child"

    def parent() -> None:
        me = os.getpid()

        def child() -> None:
            end_with_parent(me)
            noted.with_suffix(".new").write_text(str(os.getpid()))
            noted.with_suffix(".new").rename(noted)
            time.sleep(1000)

        _forked(child)
        time.sleep(1000)

    first = _forked(parent)
    _wait_until(noted.exists)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    _wait_until(lambda: not _runs(int(noted.read_text())))


def _runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_says_how_to_go_on_and_fails(number: int, status: int) -> None:
    code = (
        "import os, sys, time\nfrom plugins.tools.process import exit_when_stopped\n"
        f"with exit_when_stopped('run it again'):\n    os.kill(os.getpid(), {int(number)})\n    time.sleep(1000)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == status
    assert ended.stdout == f"stopped by {signal.Signals(number).name} before the end; run it again\n"
    assert ended.stderr == ""


def _in_a_finalizer(number: int) -> str:
    return (
        f"class Loader:\n    def __del__(self):\n        os.kill(os.getpid(), {number})\nLoader()\ntime.sleep(1000)\n"
    )


def _swallowed(number: int) -> str:
    return f"try:\n    os.kill(os.getpid(), {number})\nexcept BaseException:\n    time.sleep(1000)\n"


def _while_tidying_up(number: int) -> str:
    return f"try:\n    os.kill(os.getpid(), {number})\n    time.sleep(1000)\nfinally:\n    time.sleep(1000)\n"


def _just_in_time(number: int) -> str:
    return f"try:\n    os.kill(os.getpid(), {number})\nfinally:\n    time.sleep(process.GRACE_SECONDS)\n"


@pytest.mark.parametrize("code", [_in_a_finalizer, _swallowed, _while_tidying_up, _just_in_time])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_hangs_when_it_is_stopped_ends_with_the_same_line(
    number: int, status: int, code: Callable[[int], str]
) -> None:
    start = "import os, time\nfrom plugins.tools import process\nprocess.GRACE_SECONDS = 0.3\n"
    start += "with process.exit_when_stopped('start again'), process.exit_when_stopped('go on'):\n"
    whole = start + textwrap.indent(code(int(number)), "    ")
    ended = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=False)
    assert ended.returncode == status
    assert ended.stdout == f"stopped by {signal.Signals(number).name} before the end; go on\n"
    assert ended.stderr == ""


def test_a_hanging_run_ends_even_if_its_advice_fails() -> None:
    code = (
        "import os, time\nfrom plugins.tools import process\nprocess.GRACE_SECONDS = 0.3\n"
        f"with process.exit_when_stopped(lambda: 1 / 0):\n{textwrap.indent(_swallowed(int(signal.SIGTERM)), '    ')}"
    )
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=600, check=False)
    assert ended.returncode == 143


def test_handlers_are_restored() -> None:
    before, shown = (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)), sys.unraisablehook
    with exit_when_stopped("run it again"):
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert sys.unraisablehook is shown
