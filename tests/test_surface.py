"""METHODS, the README and the built wheel agree on what there is."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from plugins.methods import METHODS
from plugins.spec import MethodSpec

ROOT = Path(__file__).parents[1]


def test_methods_are_sorted_and_named_after_their_modules():
    assert list(METHODS) == sorted(METHODS)
    modules = {path.stem for path in (ROOT / "plugins" / "methods").glob("*.py")} - {"__init__", "common", "dissl_dino"}
    assert set(METHODS) == modules
    assert all(isinstance(spec, MethodSpec) and spec.name == name for name, spec in METHODS.items())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_option_is_explained_and_its_default_allowed(name):
    spec = METHODS[name]
    assert spec.reference and spec.title
    for option in spec.options.values():
        assert len(option.help) > 10
        assert option.choices is None or option.default in option.choices
    assert dict(spec.resolve({})) == {key: option.default for key, option in spec.options.items()}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpah": 1}, "has no option 'alpah'; known options: alpha"),
        ({"alpha": "x"}, "alpha must be a float, got 'x'"),
        ({"alpha": True}, "alpha must be a float, got True"),
        ({"normalize": 1}, "normalize must be a bool, got 1"),
        ({"mode": "both"}, "mode must be one of sequential, pooled, got 'both'"),
        ({"alpha": 1.0, "dp_alpha": 1.0}, "'alpha' and 'dp_alpha' are names of the same option"),
        ({"use_l2": "yes"}, "use_l2 must be one of cosine, euclidean, got 'yes'"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        METHODS["isoloss"].resolve(given)


def test_options_translate_the_forks_names():
    options = METHODS["directpred"].resolve({"dp_alpha": 1, "eps_iso": 0.25, "dp_tau": 0.5, "use_l2": True})
    wanted = {"alpha": 1.0, "eps": 0.25, "rho": 0.5, "metric": "euclidean"}
    assert {key: options[key] for key in wanted} == wanted


def test_readme_lists_every_method():
    from plugins.experiments.methods_table import method_table

    readme = (ROOT / "README.md").read_text()
    assert method_table() in readme, "run: python -m plugins.experiments.methods_table --write README.md"


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_link_of_a_page_is_there(page):
    text = (ROOT / page).read_text()
    for name in re.findall(r"`((?:plugins|solo_ext|lightly_ext|vissl_ext|configs|tests|docs)/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / name).exists(), name


def test_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    links = re.findall(r"\]\(([^)]+)\)", readme)
    specs = {name for name in PAGES if name.startswith("docs/specs/")}  # the methods' pages lead to them
    assert {name for name in PAGES if name != "README.md"} - specs <= set(links)
    methods = "".join(path.read_text() for path in ROOT.glob("docs/methods/*.md"))
    assert all(f"](../{name.removeprefix('docs/')})" in methods for name in specs)
    assert not {link for link in links if link.startswith("docs/") and links.count(link) > 1}


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_of_a_page_run(page):
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_a_page_runs_is_there(page):
    ours = r"-m ((?:plugins|solo_ext|lightly_ext|vissl_ext)[\w.]*)"
    for module in re.findall(ours, (ROOT / page).read_text()):
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_workflow_runs_what_the_checks_are():
    (file,) = (ROOT / ".github" / "workflows").glob("*.yml")
    (job,) = yaml.safe_load(file.read_text())["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.12"] and job["timeout-minutes"] <= 120
    assert job["steps"][-1]["run"] == ".ci/run" and os.access(ROOT / ".ci" / "run", os.X_OK)


def test_badges_of_the_readme_are_true():
    project = (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    badges = dict(re.findall(r"!\[([^]]+)\]\(https://img\.shields\.io/badge/([^)]+)\)", readme))
    assert len(badges) == 3
    wanted = {
        "Python {} or newer": re.search(r'requires-python = ">=([\d.]+)"', project),
        "PyTorch {} or newer": re.search(r'"torch>=([\d.]+)"', project),
    }
    for text, version in wanted.items():
        assert version[1] in badges[text.format(version[1])]
    assert 'license = "Apache-2.0"' in project and "Apache--2.0" in badges["Licence Apache 2.0"]


def test_no_file_names_a_package_index_or_a_home():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "uv.lock" not in files
    for name in files:
        if not name.endswith((".png", ".pdf")):
            text = (ROOT / name).read_text()
            assert "pypi" + ".org" not in text and "/home" + "/" not in text, name


@pytest.mark.slow
def test_wheel_holds_packages_and_configurations(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"hydra_plugins", "lightly_ext", "plugins", "solo_ext", "vissl_ext"}
    assert "hydra_plugins/__init__.py" not in names, "hydra_plugins belongs to all packages in common"
    shipped = {path.name for path in (ROOT / "configs" / "solo" / "digits").glob("*.yaml")}
    assert {f"solo_ext/configs/digits/{name}" for name in shipped} <= set(names)
    assert {f"plugins/configs/probes/dissl_{name}.yaml" for name in ("linear", "transfer")} <= set(names)

    # an installed copy finds its configurations from anywhere
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = (
        "from plugins.tools.shipped import shipped_configs; from solo_ext.launch import config_folder; "
        "print(config_folder('configs/solo/digits'), *map(shipped_configs, ('probes', 'ssv', 'vissl')))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    places = ("solo_ext/configs/digits", "plugins/configs/probes", "solo_ext/ssv/configs", "vissl_ext/configs")
    assert found.stdout.split() == [str((target / place).resolve()) for place in places]
