"""The fast tests of this folder, once more with the release of lightly before the one that is installed.

Those of several processes are left out: what happens between processes is ours, whichever lightly there is. Of the
tests with many cases a sample is run, as with --fast; test_models.py and test_lightning.py still train every method.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lightly, pytest.mark.slow]

RELEASE = "1.5.26"
ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / ".lightly-1.5"


def test_the_fast_tests_pass_with_the_last_release_of_1_5() -> None:
    """A process holds one release: another one finds the older lightly before the one of the environment."""
    assert (OVERLAY / "lightly").is_dir(), f"lightly {RELEASE} is not in {OVERLAY}: ./run_experiments.sh test makes it"
    options = ("-p", "no:cacheprovider", "-m", "not slow and not more and not ddp")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/lightly", *options],
        env={**os.environ, "PYTHONPATH": f"{OVERLAY}{os.pathsep}{ROOT}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"lightly {RELEASE}" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and " failed" not in done.stdout and " skipped" not in done.stdout, done.stdout
