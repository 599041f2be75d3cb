"""Every shell command of the README and of docs/ works as described, on a small scale.

Commands of plugins.tools run. Suites are run with --dry-run. Commands that train are taken up to where
training starts: options, configuration, method and folders are checked by the commands' own code. The trainings
themselves are in tests/solo, tests/lightly and tests/vissl.
"""

import importlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from plugins.experiments.method_pages import commands as method_commands
from plugins.experiments.method_pages import hand_written
from plugins.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
OURS = r"(?:plugins|solo_ext|lightly_ext|vissl_ext)\."
ELSEWHERE = {
    r"\./run_experiments\.sh( test( -k \w+)?)?": "tests/test_shell.py",
    r"\./run_experiments\.sh --help": "tests/test_shell.py",
    r"python -m pytest [\w/.]+( .*)?": "tests/test_docs_example.py, and the suite itself",
    r"python -m plugins\.experiments\.methods_table --write README\.md": "tests/test_docs_example.py",
    r"python -m plugins\.experiments\.method_pages --write": "tests/test_docs_example.py",
    r"python -m plugins\.experiments\.bench .*": "tests/experiments/test_bench.py",
    r"python -m plugins\.experiments\.notebooks \w+": "tests/test_docs_notebooks.py",
    r"python -m plugins\.tools\.data tinyimagenet .*": "tests/tools/test_data.py, which makes such an archive",
    r"source \.venv/bin/activate": "made by ./run_experiments.sh",
    r"git clone .* && .*": "needs a network",
    r"(uv )?pip install .*|uv sync .*": "needs a package index",
    r"python3? main_(pretrain|lincls|knn|umap)\.py .*": "the fork's own command",
    r"python -m solo_ext\.main_\w+ --config-path scripts/\w+/imagenet-100/ .*": "tests/solo/test_forks.py",
    r"python (-m torch\.distributed\.launch .*main_vicreg|run_with_submitit|evaluate)\.py .*": "VICReg's own commands",
    r"python configs/detectron2/train\.py .*": "tests/tools, where detectron2 is installed",
    r"(python|torchrun --nproc-per-node 2) train\.py": "tests/test_docs_loop.py",
    r"python -m extra_scripts\..*": "tests/vissl/test_engines.py",
    r"python -m vissl_ext\.launch --import .*": "tests/vissl/test_loading.py",
    r"mkdocs \w+": "a check of ./run_experiments.sh test",
}
"""Pattern of a whole command → why it is not run here, or where it is."""


def commands_of(text: str) -> list[str]:
    """Commands of a page, in fenced bash blocks and inline.

    Continued lines are joined, comments are dropped, a loop is taken once. Inline commands with a
    placeholder are left out.
    """
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        variables = {}
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            if loop := re.fullmatch(r"for (\w+) in (\S+).*; do", line):
                variables[loop[1]] = loop[2]
            elif line and line != "done":
                for name, value in variables.items():
                    line = line.replace(f"${name}", value)
                found.append(" ".join(line.split()))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(rf"`((?:python -m {OURS}[^\s`]*|\./run_experiments\.sh) [^`]+)`", prose)
    return found + [command for command in inline if not re.search(r"…|[<>]|\b[A-Z]{3,}\b", command)]


CASES = [(page, command) for page in PAGES for command in commands_of(hand_written((ROOT / page).read_text()))]
# The methods' pages differ in the name alone, but for lightly's options; tests/solo and tests/vissl compose every file.
for _name in METHODS:
    _made = method_commands(_name)
    _kept = _made.values() if _name == "isoloss" else [_made["lightly"]]
    CASES += [(f"page of {_name}", command.replace("\\\n", "")) for command in _kept]
CASES = [(page, command) for command, page in {command: page for page, command in reversed(CASES)}.items()]  # each once
CASES = [case for case in CASES[::-1] if not any(re.fullmatch(one, case[1]) for one in ELSEWHERE)]


def _images(folder: Path, count: int) -> None:
    """One image many times, in ten classes, which the digits have."""
    image = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(image, "PNG")
    for index in range(count):
        place = folder / str(index % 10) / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(image.getvalue())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands of the pages use."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("datasets/digits", "datasets/imagenet", "IMAGENET"):
        for split, count in (("train", 1000), ("val", 200)):
            _images(folder / name / split, count)
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    for name in ("", "_TEST"):
        features = rng.normal(size=(60, 8)).astype("float32") + 3 * np.eye(8, dtype="float32")[labels]
        np.save(folder / f"X{name}.npy", features)
        np.save(folder / f"Y{name}.npy", labels)
    (folder / "voc07").mkdir()
    for split in ("train", "test"):  # as VISSL's script makes them
        np.save(folder / "voc07" / f"{split}_images.npy", np.array(["a.jpg"] * 60))
        np.save(folder / "voc07" / f"{split}_labels.npy", np.eye(20, dtype=int)[np.arange(60) % 20])
    return folder


@pytest.fixture(scope="module")
def fork_of_the_isoloss_paper(work: Path) -> Iterator[None]:
    place = work / "implicit-var-reg" / "scripts" / "pretrain" / "cifar"
    place.parent.mkdir(parents=True)
    place.symlink_to(ROOT / "configs" / "solo" / "cifar")
    (work / "scripts").symlink_to(work / "implicit-var-reg" / "scripts")  # a command in the checkout
    yield


@pytest.fixture(scope="module")
def fork_of_the_dissl_paper(work: Path) -> None:
    """Stand-ins with the fork's names; tests/vissl runs the fork's own files."""
    base = yaml.safe_load((ROOT / "configs/vissl/config/pretrain/base/imagenet_rn50.yaml").read_text())
    views = {"name": "ImgPilToMultiCrop", "total_num_crops": 2, "size_crops": [160], "num_crops": [2]}
    transforms = [{**views, "crop_scales": [[0.14, 1]]}, *base["config"]["DATA"]["TRAIN"]["TRANSFORMS"][2:]]
    file = {
        "defaults": ["/config/pretrain/dissl/imagenet_rn50", "_self_"],
        "config": {"DATA": {"TRAIN": {"TRANSFORMS": transforms}}},
    }
    files = {f"pretrain/dstl/{name}": file for name in ("dissl_e100_d8192_m6", "dissl_e100_d2048_m2")}
    files["server/sphinxmem"] = {"config": {"SLURM": {"PARTITION": "sphinx"}}}
    extract = {"defaults": ["/config/feature_extraction/digits/extract", "_self_"], "engine_name": "extract_features"}
    files["feature_extraction/extract_resnet_z8192"] = extract
    for name, content in files.items():
        path = work / "FORK" / "configs" / "config" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# @package _global_\n" + yaml.safe_dump(content))
    for split in ("train", "test"):
        _images(work / "FLOWERS" / split, 20)


@pytest.fixture(scope="module")
def files_of_vicreg(work: Path) -> None:
    """The two files of its training script, whose tensors are views of one number, and a list of images."""
    from plugins.tools.data import make_subset
    from plugins.tools.export import build_network

    with torch.device("meta"):
        state = build_network("torchvision", "resnet50").state_dict()
    state = {name: torch.zeros((), dtype=value.dtype).expand(value.shape) for name, value in state.items()}
    torch.save(state, work / "resnet50.pth")
    full = {f"module.backbone.{name}": value for name, value in state.items()}
    torch.save({"epoch": 1, "model": {**full, "module.projector.0.weight": torch.zeros(1)}}, work / "model.pth")
    (work / "1percent.txt").write_text("".join(f"{index}.png\n" for index in range(20)))
    make_subset(work / "IMAGENET" / "train", work / "IMAGENET" / "train_1", names=work / "1percent.txt")


def _solo(module: str, words: list[str], patch: pytest.MonkeyPatch) -> None:
    from solo_ext import config
    from solo_ext.registry import method_class, register

    register()
    driver = importlib.import_module(module)
    seen = []

    def check(given: object) -> None:
        if module.endswith("pretrain"):
            cfg = config.parse_pretrain(given)
            cls = method_class(cfg)
            seen.append(cls)
        else:
            seen.append(config.parse_linear(given) if module.endswith("linear") else given)

    task = {"main_pretrain": "pretrain", "main_umap": "draw"}.get(module.rpartition(".")[2], "evaluate")
    patch.setattr(driver, task, check)
    on_cpu = ["++accelerator=cpu"] if "configs/solo/imagenet" in words else []  # the page's machine has GPUs
    patch.setattr(sys, "argv", [module, *words, *on_cpu])
    driver.main()
    assert len(seen) == 1


def _ssv(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """Check a command of Self-Supervised-Vision up to its task; tests/solo/test_ssv*.py do these."""
    from solo_ext import config
    from solo_ext.registry import method_class, register
    from solo_ext.ssv import command
    from solo_ext.ssv.translate import translate

    register()
    seen = []

    def check(given: command.Arguments) -> None:
        devices = {"devices": given.devices}
        cfg = translate(given.document, given.algo, given.arch, output=given.output, **devices)
        seen.append(method_class(config.parse_pretrain(cfg)))

    patch.setattr(command, "TASKS", dict.fromkeys(command.TASKS, check))
    command.run(words)
    assert len(seen) == 1


def _vissl(words: list[str], patch: pytest.MonkeyPatch) -> None:
    from vissl_ext import defaults, launch
    from vissl_ext.compat import missing_weights

    if "config.SLURM.USE_SLURM=true" in words:
        patch.setattr(defaults.shutil, "which", lambda name: name)  # the page's cluster has sbatch
    patch.setattr(missing_weights, "check_weights_file", lambda weights: None)  # of a run that an earlier command makes
    seen = []
    patch.setattr(launch, "run", lambda args, config: seen.append(config))
    launch.main(words)
    assert len(seen) == 1 or "--list" in words


def _lightly(words: list[str], patch: pytest.MonkeyPatch) -> None:
    from lightly_ext.benchmarks import run
    from lightly_ext.benchmarks.__main__ import main

    reached = []
    prepare = run.prepare
    patch.setattr(run, "prepare", lambda options: prepare(_ready(options)))
    patch.setattr(run, "benchmark", reached.append)
    main(words)
    assert reached


def _ready(args):
    args.accelerator, args.devices = "cpu", 1  # the page's machine has eight GPUs
    args.batch_size_per_device = min(args.batch_size_per_device, 8)  # of few images
    if args.ckpt_path is not None:
        assert str(args.ckpt_path).startswith("RUN/")  # of a run that an earlier command makes
        args.ckpt_path = None
    return args


def _suite(words: list[str], capsys: pytest.CaptureFixture) -> None:
    from plugins.experiments import run

    assert run.main([*words, "--dry-run"] if "--dry-run" not in words else words) in (0, None)
    assert ("| state" if "--status" in words else "python") in capsys.readouterr().out


def _tool(module: str, words: list[str], work: Path, patch: pytest.MonkeyPatch) -> None:
    name = module.rpartition(".")[2]
    tool = importlib.import_module(module)
    if name == "data" and words[0] == "digits":
        words = [*words, "--out", str(work / "fresh" / "digits")]
    if name == "export":
        import torchvision

        network = torchvision.models.resnet18()
        network.fc = torch.nn.Identity()
        torch.save(
            {"state_dict": {f"backbone.{key}": value for key, value in network.state_dict().items()}}, "CHECKPOINT"
        )
    if name == "linear_eval":
        options = tool.parser().parse_args(words)
        tool._check(options)
        if options.features is not None:
            from plugins.tools.features import save_features

            for split, ending in (("train", ""), ("test", "_TEST")):
                arrays = [torch.from_numpy(np.load(f"{letter}{ending}.npy")) for letter in "XY"]
                save_features(options.features, split, "backbone", *arrays)
        if options.weights is not None:
            from plugins.tools.weights import NAMES

            assert options.weights in NAMES  # its download needs a network
            return
    if name == "quality":
        from plugins.tools.resnet8 import resnet8

        np.save("features.npy", np.random.default_rng(0).normal(size=(40, 8)))
        state = resnet8().state_dict()
        torch.save({f"backbone.{key}": value for key, value in state.items() if key[:3] != "fc."}, "CHECKPOINT")
        if "--views" in words:
            words[words.index("--views") + 1] = "2"
    if name in ("report", "quality_report"):
        (work / words[0]).mkdir(parents=True, exist_ok=True)
        patch.setattr(tool, "main", lambda argv=None: 0)
    assert tool.main(words) in (0, None)


@pytest.mark.sample("README.md: python -m *_ext.*", "page of isoloss: *")
@pytest.mark.parametrize(("page", "command"), CASES, ids=[f"{page}: {command[:70]}" for page, command in CASES])
def test_command_of_a_page(
    page, command, work, fork_of_the_isoloss_paper, fork_of_the_dissl_paper, files_of_vicreg, monkeypatch, capsys
):
    monkeypatch.chdir(work)
    words = shlex.split(command)
    if words[0] == "./run_experiments.sh":
        return _suite(words[1:], capsys)
    if words[:2] == ["python", "main.py"]:
        return _ssv(words[2:], monkeypatch)
    assert words[:2] == ["python", "-m"], f"{page}: no test knows how to run: {command}"
    module, rest = words[2], words[3:]
    if rest[-1:] in (["--help"], ["--help-config"]):
        monkeypatch.setattr(sys, "argv", [module, *rest])
        name = f"{module}.__main__" if module.endswith("benchmarks") else module
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(name).main()
        assert not ended.value.code and len(capsys.readouterr().out) > 500
        return None
    if module == "solo_ext.ssv":
        return _ssv(rest, monkeypatch)
    if module.startswith("solo_ext."):
        return _solo(module, rest, monkeypatch)
    if module == "vissl_ext.launch":
        return _vissl(rest, monkeypatch)
    if module == "lightly_ext.benchmarks":
        return _lightly(rest, monkeypatch)
    if module.startswith("lightly_ext.examples."):
        steps = rest.index("--steps") + 1  # tests/lightly/test_examples.py trains all of them
        (work / "example").mkdir(exist_ok=True)  # where it makes its own digits
        monkeypatch.chdir(work / "example")
        importlib.import_module(module).main([*rest[:steps], "1", *rest[steps + 1 :]])
        assert "kNN trained" in capsys.readouterr().out
        return None
    assert module.startswith("plugins."), f"{page}: no test knows how to run: {command}"
    return _tool(module, rest, work, monkeypatch)


def test_every_exception_is_of_a_page():
    every = [command for page in PAGES for command in commands_of((ROOT / page).read_text())]
    unused = [pattern for pattern in ELSEWHERE if not any(re.fullmatch(pattern, command) for command in every)]
    assert unused in ([], [r"mkdocs \w+"]), unused
