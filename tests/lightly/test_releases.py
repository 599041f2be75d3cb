"""The tests of this folder, once more with the release of lightly before the one that is installed."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lightly, pytest.mark.slow]

PYTHON = "LIGHTLY_1_5_PYTHON"
RELEASE = "1.5.26"
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(1800)
def test_all_of_this_with_the_last_release_of_1_5() -> None:
    """A process holds one release: another interpreter, of an environment that has lightly 1.5.26, runs the tests."""
    python = os.environ.get(PYTHON)
    if python is None:
        pytest.skip(f"NOT TESTED: lightly {RELEASE}, since {PYTHON} names no interpreter of an environment that has it")
    done = subprocess.run(
        [python, "-m", "pytest", "tests/lightly", "-q", "-p", "no:cacheprovider", "-m", "not slow"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"lightly {RELEASE}" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and " failed" not in done.stdout
