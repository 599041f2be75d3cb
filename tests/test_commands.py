"""The commands in a folder with another package ``plugins``."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = dict(re.findall(r'^(ssl-[\w-]+) = "([\w.]+:\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
GUARDED = {
    "solo_ext": [f"solo_ext.main_{name}" for name in ("pretrain", "linear", "knn", "umap", "probe")],
    "lightly_ext": ["lightly_ext.benchmarks"],
    "vissl_ext": ["vissl_ext.launch"],
}

# Each command in a fork of one process; a console script's file is what pip makes of its entry.
PROGRAM = """
import contextlib, importlib, io, json, os, runpy, sys
kind, jobs = json.loads(sys.argv[1])
if kind == "script":
    import hydra, numpy, torch  # once, for all
results = {}
for name, entry in jobs.items():
    read, write = os.pipe()
    if os.fork() == 0:
        out, status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                if kind == "script":
                    sys.argv = [f"/somewhere/bin/{name}", "--help"]
                    module, function = entry.split(":")
                    status = getattr(importlib.import_module(module), function)()
                else:
                    sys.argv = ["-m", "--help"]
                    sys.path[0] = os.getcwd()  # as python -m has it
                    runpy.run_module(entry, run_name="__main__")
            except SystemExit as error:
                status = error.code
            except BaseException as error:
                status = repr(error)
        os.write(write, json.dumps([status, out.getvalue()[:3000]]).encode())
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        results[name] = json.load(pipe)
    os.wait()
print(json.dumps(results))
"""


@pytest.fixture
def run(tmp_path):
    """run(kind, jobs) → {name: [status, output]} in a folder with a package ``plugins``."""
    (tmp_path / "work" / "plugins").mkdir(parents=True)
    (tmp_path / "work" / "plugins" / "__init__.py").write_text("raise RuntimeError('the other plugins')\n")
    (tmp_path / "program.py").write_text(PROGRAM)

    def go(kind, jobs):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        words = [sys.executable, str(tmp_path / "program.py"), json.dumps([kind, jobs])]
        done = subprocess.run(words, cwd=tmp_path / "work", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return go


@pytest.mark.slow
def test_console_scripts_do_not_mind_another_plugins(run):
    results = run("script", SCRIPTS)
    for name, (status, output) in results.items():
        assert status in (0, None), (name, status, output)
        assert output.startswith(f"usage: {name} ") and f"python -m {SCRIPTS[name].split(':')[0]}" not in output, name


def test_modules_say_what_hides_plugins(run, tmp_path):
    results = run("module", {module: module for modules in GUARDED.values() for module in modules})
    place = (tmp_path / "work" / "plugins").resolve()
    for module, (status, output) in results.items():
        package = module.split(".")[0]
        assert status == 2, (module, status, output)
        assert output.startswith(f"error: {place} hides the package 'plugins' that {package} needs; run the command")
        assert output.count("\n") == 1
        script = next(name for name, entry in SCRIPTS.items() if entry.split(":")[0].startswith(module))
        assert script in output


def test_the_scripts_are_those_that_the_documentation_names():
    assert len(SCRIPTS) == 10  # Python 3.10 has no tomllib, which would read them without a pattern


def test_every_guarded_package_is_all_there_are():
    assert set(GUARDED) == {path.parent.name for path in ROOT.glob("*_ext/__init__.py")}


def test_imports_raise_the_sentence(tmp_path, monkeypatch):
    from plugins import shadow

    other = tmp_path / "plugins"
    monkeypatch.setattr(shadow, "other_plugins", lambda: other)
    with pytest.raises(ImportError, match=f"{other} hides .* rename it, or remove {tmp_path} from"):
        shadow.check("lightly_ext")


@pytest.mark.parametrize(
    ("package", "file"), [("solo_ext", "solo/losses/isoloss.py"), ("vissl_ext", "vissl/losses/dstl_issl_loss.py")]
)
def test_a_command_in_the_checkout_of_a_fork_imports_the_installed_framework(
    package, file, tmp_path, monkeypatch, capsys
):
    from plugins import shadow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["-m"])
    (tmp_path / file).parent.mkdir(parents=True)
    shadow.check(package)
    assert sys.path[0] == str(tmp_path), "a folder of that name is no fork"
    (tmp_path / file).touch()
    monkeypatch.setattr(sys, "argv", ["own_script.py"])
    shadow.check(package)
    assert sys.path[0] == str(tmp_path) and capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "argv", ["-m"])
    shadow.check(package)
    assert str(tmp_path) not in sys.path
    name = package.removesuffix("_ext")
    assert capsys.readouterr().err == f"{tmp_path / name} is a fork: the installed {name} is used\n"


def test_stock_scripts_go_on_without_our_methods(tmp_path):
    """A checkout of solo-learn with another package ``plugins``."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "__init__.py").write_text("")
    hook = "from hydra_plugins.solo_ext_plugin import SoloExtPlugin; SoloExtPlugin().manipulate_search_path(None)"
    code = f"import sys; sys.modules['solo.backbones'] = sys; {hook}; print('went on')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "went on\n"
    assert done.stderr.startswith(f"solo_ext adds no methods: {tmp_path.resolve() / 'plugins'} hides the package")


def test_folders_without_init_hide_nothing(tmp_path):
    (tmp_path / "plugins").mkdir()
    code = "import solo_ext, plugins.tools.command; print('found')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "found\n", done.stderr
