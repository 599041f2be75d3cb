"""The wheel, installed by pip: what each extra brings is enough for its framework, and a missing package is named.

Each framework has a separate environment with only the distributions that its extra requires, as links to those of
the test environment. pip installs the wheel into it without an index, so it checks every requirement. With the
environment variable PIP_INSTALLS=1, pip does the same with empty environments and the package index.
"""

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest

from plugins.install import REQUIRED, not_installed

ROOT = Path(__file__).parents[1]
HOSTS = {"solo": "solo-learn==1.0.2", "vissl": "vissl==0.1.6", "lightly": None}
SCRIPTS = {
    "solo": ["ssl-pretrain", "ssl-linear", "ssl-knn", "ssl-umap", "ssl-probe"],
    "vissl": ["ssl-vissl"],
    "lightly": ["ssl-lightly"],
}
SHARED = ["ssl-data", "ssl-export", "ssl-linear-eval"]

# What a user does after the installation: one training step, then the commands' help; prints one line of JSON.
# A fork runs each script, for importing torch and the framework takes seconds.
PROGRAM = """
import contextlib, importlib, io, json, os, runpy, sys
from pathlib import Path
framework, scripts = json.loads(sys.argv[1])
sys.path.pop(0)  # as in a console script, the folder of the program is not searched
scripts_folder = Path(sys.executable).parent


def run(name, *words):
    read, write = os.pipe()
    if os.fork() == 0:
        out, status = io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            sys.argv = [str(scripts_folder / name), *words]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as error:
                status = error.code
            except BaseException as error:
                import traceback
                traceback.print_exc()
                status = repr(error)
        with open(write, "w") as pipe:
            json.dump([status, out.getvalue()[-30000:]], pipe)
        os._exit(0)
    os.close(write)
    with open(read) as pipe:
        result = json.load(pipe)
    os.wait()
    return result


import torch, torchvision
from PIL import Image

torch.set_num_threads(1)
results = {}
for split in ("train", "val"):
    for label in ("a", "b"):
        folder = Path("images") / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(4):
            Image.new("RGB", (16, 16), (60 * index, 90, 30 if label == "a" else 200)).save(folder / f"{index}.png")
images = Path("images").resolve()
if framework == "lightly":
    from lightly_ext.models import IsoLoss

    backbone = torchvision.models.resnet18()
    backbone.fc = torch.nn.Identity()
    model = IsoLoss(backbone)
    before = [parameter.clone() for parameter in model.training_parameters()]
    optimizer = torch.optim.SGD(model.training_parameters(), lr=0.06)
    loss = model.loss([torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)])
    loss.backward()
    optimizer.step()
    moved = any(not torch.equal(new, old) for new, old in zip(model.training_parameters(), before))
    results["step"] = [0 if moved and loss.isfinite() else "nothing moved", str(loss)]
    from lightly_ext.benchmarks import run as _  # needed by the command
elif framework == "solo":
    with contextlib.redirect_stdout(io.StringIO()):
        import solo_ext.main_pretrain
    results["step"] = run(
        "ssl-pretrain", "--config-path", "configs/solo/digits", "--config-name", "isoloss.yaml", "++max_epochs=1",
        f"data.train_path={images / 'train'}", f"data.val_path={images / 'val'}", "optimizer.batch_size=8",
        "++method_kwargs.proj_hidden_dim=32", "++method_kwargs.proj_output_dim=16", "knn_eval.enabled=false",
    )
elif framework == "vissl":
    import vissl_ext.launch
    results["step"] = run(
        "ssl-vissl", "config=pretrain/isoloss/digits", f"config.DATA.TRAIN.DATA_PATHS=[{images / 'train'}]",
        "config.DATA.TRAIN.BATCHSIZE_PER_REPLICA=8", "config.OPTIMIZER.num_epochs=1", "config.CHECKPOINT.DIR=run",
        "config.LOSS.isoloss.proj_hidden_dim=32", "config.LOSS.isoloss.proj_output_dim=16",
    )
for script in scripts:
    results[script] = run(script, "--help")
print(json.dumps(results))
"""


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", text).group()).lower()


def _requirements(found: Distribution, extras: frozenset[str]) -> list[tuple[str, frozenset[str]]]:
    """The requirements of a distribution that hold here: (name, extras) of each."""
    from packaging.requirements import Requirement

    result = []
    for requirement in map(Requirement, found.requires or ()):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in (*extras, "")):
            result.append((_name(requirement.name), frozenset(requirement.extras)))
    return result


def _link(found: Distribution, site: Path) -> None:
    """Link what a distribution has installed at the top of site-packages; a shared namespace one level deeper."""
    tops = set()
    for file in found.files or ():
        if file.parts[0] in ("..", "__pycache__"):
            continue
        source = Path(found.locate_file(file.parts[0]))
        shared = source.is_dir() and source.suffix != ".dist-info" and not (source / "__init__.py").exists()
        tops.add(file.parts[: 2 if shared else 1])
    for parts in tops:
        target = site.joinpath(*parts)
        target.parent.mkdir(exist_ok=True)
        if not target.exists():
            target.symlink_to(found.locate_file(Path(*parts)))


def _show(first: list[tuple[str, frozenset[str]]], site: Path) -> None:
    """Link distributions and everything that they require."""
    installed = {_name(found.metadata["Name"]): found for found in distributions()}
    todo, done = list(first), set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) not in done:
            done.add((name, extras))
            assert name in installed, f"{name} is required, and is not in the environment of the tests"
            _link(installed[name], site)
            todo += _requirements(installed[name], extras)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def _run(words: list[str], folder: Path, **more: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"OMP_NUM_THREADS": "1", **more}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the package pip, which ``venv`` takes seconds to install."""
    folder = tmp_path_factory.mktemp("pip")
    _run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
    (found,) = (folder / "venv" / "lib").glob("python*/site-packages/pip")
    return found


def _environment(wheel: Path, extra: str, folder: Path, pip_package: Path, index: bool) -> Path:
    """Make a virtual environment and install the wheel with its extra by pip; its Python."""
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], folder)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "pip").symlink_to(pip_package)
    # bytecode only of what is imported
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    host = HOSTS[extra]
    if index:
        _run([*pip, f"{wheel}[{extra}]"], folder)
        if host is not None:
            _run([*pip, "--no-deps", host], folder)
        return python
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        (folder / "METADATA").write_bytes(archive.read(metadata))
    ours = Distribution.at(folder)
    _show(_requirements(ours, frozenset([extra])), site)
    # the user's configuration of pip may hold constraints and folders of wheels
    _run([*pip, "--isolated", "--no-index", f"{wheel}[{extra}]"], folder, PIP_CONFIG_FILE=os.devnull)
    if host is not None:
        _link(distribution(host.partition("==")[0]), site)
    return python


def _check(wheel: Path, extra: str, folder: Path, pip: Path, index: bool) -> None:
    python = _environment(wheel, extra, folder, pip, index)
    work = folder / "work"
    (work / "plugins").mkdir(parents=True)  # a folder of the user's that must not hide ours
    (work / "plugins" / "__init__.py").write_text("raise RuntimeError('the other plugins')\n")
    (folder / "program.py").write_text(PROGRAM)
    others = [names[0] for framework, names in SCRIPTS.items() if framework != extra]
    scripts = [*SCRIPTS[extra], *(SHARED if extra == "lightly" else ()), *others]
    output = _run([str(python), str(folder / "program.py"), json.dumps([extra, scripts])], work)
    results = json.loads(output.splitlines()[-1])
    status, text = results.pop("step")
    assert status in (0, None), text
    for script, (status, text) in results.items():
        if script in others and status == 2:
            owner = next(framework for framework, names in SCRIPTS.items() if script in names)
            command = not_installed(owner).partition("install it with: ")[2]
            assert text.startswith("error: ") and command in text and text.count("\n") == 1, text
        else:
            assert status in (0, None) and text.startswith(f"usage: {script} "), (script, status, text)
    assert extra != "lightly" or results["ssl-pretrain"][0] == results["ssl-vissl"][0] == 2


@pytest.mark.parametrize("extra", HOSTS)
@pytest.mark.slow
def test_one_training_step_with_what_the_extra_brings(extra: str, wheel: Path, pip: Path, tmp_path: Path) -> None:
    _check(wheel, extra, tmp_path, pip, index=False)


@pytest.mark.parametrize("extra", HOSTS)
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_training_step_after_pip_install_from_the_index(extra: str, wheel: Path, pip: Path, tmp_path: Path) -> None:
    if os.environ.get("PIP_INSTALLS") != "1":
        pytest.skip("NOT TESTED: pip install from the package index, several GB; PIP_INSTALLS=1 tests it")
    _check(wheel, extra, tmp_path, pip, index=True)


@pytest.mark.parametrize("package", REQUIRED)
def test_commands_look_for_all_that_an_adapter_imports(package: str) -> None:
    """The list in plugins.install is that of the imports at the top of the files."""
    known = {*sys.stdlib_module_names, "torch", "jaxtyping", "plugins", "solo_ext", "lightly_ext", "vissl_ext"}
    # a checkout's; DALI, in its own module; two that lie inside VISSL's wheel
    optional = {"solo", "nvidia", "classy_vision", "fairscale"}
    found = set()
    for file in (ROOT / package).rglob("*.py"):
        if "examples" not in file.parts:
            for node in ast.parse(file.read_text()).body:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found |= {name.partition(".")[0] for name in names}
    assert found - known - optional <= set(REQUIRED[package])


def test_hydra_finds_both_plugins_by_scan_and_by_entry_point() -> None:
    """Hydra 1.3 scans the namespace package; a later release loads a class for each entry point."""
    code = (
        "from hydra.core.plugins import Plugins; from hydra.plugins.search_path_plugin import SearchPathPlugin;"
        "print(*sorted(f'{c.__module__}:{c.__name__}' for c in Plugins.instance().discover(SearchPathPlugin)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    table = (ROOT / "pyproject.toml").read_text().partition('[project.entry-points."hydra.plugins"]\n')[2]
    entries = re.findall(r'^\w+ = "([\w.]+:\w+)"$', table.partition("\n[")[0], re.MULTILINE)
    assert len(entries) == 2 and set(entries) <= set(out.stdout.split())


def test_a_missing_package_of_a_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    from plugins.tools.command import exit_on_user_error

    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error == "error: scikit-learn is not installed; install it with: pip install scikit-learn\n"
    with pytest.raises(ModuleNotFoundError), exit_on_user_error():  # ours, not the user's
        raise ModuleNotFoundError("No module named 'plugins.lost'", name="plugins.lost")
