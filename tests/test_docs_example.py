"""The worked example of docs/adding_a_method.md, written into a copy of the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL))
NAME = "align_uniform"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tracked files with the example's six in it."""
    folder = tmp_path_factory.mktemp("example")
    words = ["git", "ls-files", "*.py", "*.yaml", "*.md", "pyproject.toml"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name, text in FILES.items():
        assert not (folder / name).exists(), f"{name} of the example exists already"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    methods = folder / "plugins" / "methods" / "__init__.py"
    text = methods.read_text()
    first = re.search(r"^( +)(\w+),\n", text, re.MULTILINE)
    entry = re.search(r"^( +)\w+\.SPEC,\n", text, re.MULTILINE)
    assert first and entry and first[2] > NAME
    text = text.replace(entry[0], f"{entry[1]}{NAME}.SPEC,\n{entry[0]}", 1)
    methods.write_text(text.replace(first[0], f"{first[1]}{NAME},\n{first[0]}", 1))
    return folder


# One process for all commands: each would import torch anew.
PROGRAM = """
import json, runpy, sys
import pytest

*scripts, tests = json.loads(sys.argv[1])
for module, *words in scripts:
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
"""


def test_there_are_five_new_files_and_one_line():
    kinds = ["plugins/losses", "plugins/methods", "configs/solo/digits", f"configs/vissl/config/pretrain/{NAME}"]
    assert [str(Path(name).parent) for name in FILES] == [*kinds, "tests/losses"]
    assert f"{NAME}.SPEC" in PAGE


@pytest.mark.slow
def test_commands_of_the_example_run(copy):
    """Also run its doctest and the checks of METHODS, without the tests that loop over the frameworks."""
    (commands,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    pages, table, own, every = (line.removeprefix("python -m ").split() for line in commands.strip().splitlines())
    assert own[0] == every[0] == "pytest" and every[-2:] == ["-k", NAME]
    assert all((copy / path).exists() for path in every[1:-2])
    tests = [*own[1:], "tests/test_objective.py", "tests/losses/test_every_loss.py", "tests/lightly/test_models.py"]
    tests += ["tests/test_surface.py", f"plugins/losses/{NAME}.py", "-k", f"{NAME} or sorted", "-m", "not slow"]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    words = [sys.executable, "-c", PROGRAM, json.dumps([pages, table, tests])]
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 12, done.stdout
    page = f"docs/methods/{NAME}.md"
    assert (copy / page).read_text().startswith("# Align-Uniform\n")
    assert f"[Align-Uniform]({page}) | `{NAME}`" in (copy / "README.md").read_text()


def test_example_is_clean(copy):
    names = [name for name in FILES if name.endswith(".py")]
    for words in (["check", "--quiet"], ["format", "--check", "--quiet"]):
        done = subprocess.run(["ruff", *words, *names], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
