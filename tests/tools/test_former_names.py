"""Commands that moved to plugins.experiments run under their former names."""

import subprocess
import sys

import pytest

from plugins.experiments.methods_table import method_table


@pytest.mark.slow
def test_a_former_name_runs_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "plugins.tools.methods_table"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == method_table()


@pytest.mark.sample("report")
@pytest.mark.parametrize("name", ["bench", "experiments", "report", "report_dissl", "toy_dynamics"])
def test_every_former_name_has_its_help(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"plugins.tools.{name}", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m plugins.experiments{'' if name == 'experiments' else '.' + name}" in done.stdout
