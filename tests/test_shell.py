"""run_experiments.sh, in a temporary folder with stand-ins for uv and the checkers; nothing is installed."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "run_experiments.sh"

UV = """#!/bin/bash
if [[ $1 == --version ]]; then echo "uv 1.2.3"; exit 0; fi
echo "uv $* | VIRTUAL_ENV=${VIRTUAL_ENV-} PYTHONPATH=${PYTHONPATH-} DOWNLOADS=$UV_PYTHON_DOWNLOADS" >> calls.txt
if [[ -f broken ]]; then echo "no such package" >&2; exit 4; fi
mkdir -p .venv/bin
for tool in ruff lint-imports pyright mkdocs; do
    printf '#!/bin/bash\\necho "%s $*" >> calls.txt\\n[[ ! -f broken-%s ]]\\n' $tool $tool > .venv/bin/$tool
    chmod +x .venv/bin/$tool
done
cat > .venv/bin/python <<'PYTHON'
#!/bin/bash
echo "${PYTHONDONTWRITEBYTECODE+uncached }python $*" >> calls.txt
if [[ $1 == -c && -f cores ]]; then cat cores; fi
[[ ! -f broken-python ]]
PYTHON
chmod +x .venv/bin/python
"""

EXPERIMENTS = """
import sys
if "--check" in sys.argv and "nonsense" in sys.argv:
    print("error: unknown suite", file=sys.stderr)
    sys.exit(2)
"""


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def checkout(tmp_path):
    """A copy of the script with a small package, and the stand-in for uv in ``bin``."""
    folder = tmp_path / "check out"
    (folder / "plugins" / "experiments").mkdir(parents=True)
    shutil.copy(SCRIPT, folder)
    (folder / "pyproject.toml").write_text("[project]\n")
    (folder / "uv.lock").write_text("stale\n")
    for package in (folder / "plugins", folder / "plugins" / "experiments"):
        (package / "__init__.py").touch()
    (folder / "plugins" / "experiments" / "__main__.py").write_text(EXPERIMENTS)
    write_program(tmp_path / "bin" / "uv", UV)
    return folder


def call(checkout, *arguments, **environment):
    """Run the script from another directory."""
    path = f"{checkout.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(checkout / "run_experiments.sh"), *arguments],
        cwd=checkout.parent,
        env={**os.environ, "PATH": path, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def calls(checkout):
    file = checkout / "calls.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_syntax():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_help_makes_no_environment(checkout):
    for option in ("--help", "-h"):
        done = call(checkout, option)
        assert done.returncode == 0
        assert "usage: ./run_experiments.sh" in done.stdout
    assert not (checkout / ".venv").exists()


def test_default_is_the_digits_suite(checkout):
    done = call(checkout)
    assert done.returncode == 0, done.stderr
    assert calls(checkout)[-1] == "python -m plugins.experiments digits"


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["--list"], "digits --list"),
        (["--all"], "digits --all"),
        (["toy", "--only", "a b"], "toy --only a b"),
        (["digits"], "digits"),
    ],
)
def test_options_are_passed_on(checkout, given, passed):
    assert call(checkout, *given).returncode == 0
    assert calls(checkout)[-1] == f"python -m plugins.experiments {passed}"


def test_a_wrong_command_line_makes_no_environment(checkout):
    done = call(checkout, "nonsense")
    assert done.returncode == 2
    assert done.stderr == "error: unknown suite\n"
    assert not (checkout / ".venv").exists()


def test_status_of_the_suite_is_that_of_the_script(checkout):
    call(checkout)
    (checkout / "broken-python").touch()
    assert call(checkout).returncode != 0


def test_environment_is_made_once(checkout):
    assert "making the environment" in call(checkout).stdout
    assert "used again" in call(checkout).stdout
    made = [line for line in calls(checkout) if line.startswith("uv ")]
    assert len(made) == 1
    assert made[0].startswith("uv sync --all-extras --python /")
    assert not (checkout / "uv.lock").exists()


def test_environment_is_made_anew_when_the_requirements_change(checkout):
    call(checkout)
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert "making the environment" in call(checkout).stdout
    assert "used again" in call(checkout).stdout


def test_environment_of_the_caller_does_not_leak(checkout):
    call(checkout, VIRTUAL_ENV="/elsewhere", PYTHONPATH="/elsewhere", UV_PROJECT_ENVIRONMENT="/elsewhere")
    assert calls(checkout)[0].endswith("| VIRTUAL_ENV= PYTHONPATH= DOWNLOADS=never")


def test_bytecode_is_cached_though_the_caller_forbids_it(checkout):
    """Without the cache each process of a suite or test spends seconds to compile torch and the framework again."""
    call(checkout, PYTHONDONTWRITEBYTECODE="1")
    assert calls(checkout)[-1].startswith("python -m plugins.experiments")


def test_failed_installation_says_which_step_and_is_tried_again(checkout):
    (checkout / "broken").touch()
    done = call(checkout)
    assert done.returncode == 1
    assert "no such package" in done.stderr
    assert "error: uv could not make the environment" in done.stderr
    (checkout / "broken").unlink()
    assert "making the environment" in call(checkout).stdout


def test_old_python_is_refused(checkout):
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
        old = '#!/bin/bash\ncase "$2" in *print*) echo 3.8;; *) exit 1;; esac\n'
        write_program(checkout.parent / "bin" / name, old)
    done = call(checkout, PYTHON="")
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed (python3 is 3.8" in done.stderr
    assert not (checkout / ".venv").exists()


def test_all_checks_run_even_when_some_fail(checkout):
    call(checkout)
    for tool in ("ruff", "pyright"):  # pyright runs beside the tests
        (checkout / f"broken-{tool}").touch()
    done = call(checkout, "test", "-k", "isoloss")
    assert done.returncode == 1
    checks, beside = calls(checkout)[-6:-3], calls(checkout)[-3:]
    assert checks == ["ruff check .", "ruff format --check .", "lint-imports "]
    site, pyright, pytest_call = sorted(beside)
    assert pyright == "pyright plugins" and site.startswith("mkdocs build --strict --quiet --site-dir ")
    assert not Path(site.split()[-1]).parent.exists()
    assert pytest_call == "python -m pytest --numprocesses 2 --durations=10 -k isoloss"
    assert "passed: lint-imports, pytest, mkdocs" in done.stdout
    assert "failed: ruff check (status 1), ruff format (status 1), pyright (status 1)" in done.stderr


def test_fast_leaves_out_the_slow_tests_and_says_so(checkout):
    call(checkout)
    done = call(checkout, "test", "--fast", "-x", SOLO_LEARN_CHECKOUT=str(checkout))
    assert done.returncode == 0, done.stderr
    runs = [line for line in calls(checkout) if line.startswith("python -m pytest")]
    assert len(runs) == 2 and all(line.endswith("-m not slow and not more and not ddp -x") for line in runs)
    assert not any(line.startswith(("pyright", "mkdocs")) for line in calls(checkout))
    assert "NOT TESTED: pyright, mkdocs, the slow tests" in done.stdout
    assert "NOT TESTED: pyright" not in call(checkout, "test").stdout


def test_slow_tests_have_more_workers_than_cores(checkout):
    call(checkout)
    (checkout / "cores").write_text("2\n")
    for options in (["test"], ["test", "--fast"]):
        assert call(checkout, *options).returncode == 0
    runs = [line.split()[4] for line in calls(checkout) if line.startswith("python -m pytest")]
    assert runs == ["4", "2"]


def test_passing_checks_give_status_zero(checkout):
    done = call(checkout, "test")
    assert done.returncode == 0, done.stderr
    assert "passed: ruff check, ruff format, lint-imports, pytest, pyright, mkdocs" in done.stdout


def test_lightlys_older_release_is_installed_once_and_for_the_tests_only(checkout):
    call(checkout)
    assert not (checkout / ".lightly-1.5").exists()
    assert "installing lightly==1.5.26" in call(checkout, "test").stdout
    assert "installing" not in call(checkout, "test").stdout
    (line,) = [line for line in calls(checkout) if line.startswith("uv pip")]
    assert "--python .venv/bin/python --no-deps --target .lightly-1.5 lightly==1.5.26 " in line
    assert (checkout / ".lightly-1.5" / ".gitignore").read_text() == "*\n"
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert "installing lightly==1.5.26" in call(checkout, "test").stdout


def test_a_release_of_lightly_that_cannot_be_installed_is_told_and_tried_again(checkout):
    call(checkout)
    (checkout / "broken").touch()
    done = call(checkout, "test")
    assert done.returncode == 1
    assert "error: uv could not install lightly==1.5.26" in done.stderr
    (checkout / "broken").unlink()
    assert call(checkout, "test").returncode == 0
