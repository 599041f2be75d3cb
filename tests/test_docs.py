"""The documentation's site: the generated pages and that it builds."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

from plugins.experiments.method_pages import NOT_MEASURED, commands, digits_row, hand_written, method_page, root_page
from plugins.experiments.methods_table import facts
from plugins.experiments.published import PUBLISHED
from plugins.methods import METHODS

ROOT = Path(__file__).parents[1]
JUDGEMENT = ("## Objective", "## Collapse in the logs", "## Cost", "## When to choose it")
GENERATED = ("## Options", "## Commands", "## Results")


DEFINED = {
    "part_ratio": "participation ratio",
    "H_Mlz": "mean entropy of an assignment",
    "H_M": "entropy of the mean assignment",
    "dist_to_etf": "equiangular tight frame",
    "z_std": "standard deviation",
}
"""Logged quantity → words of its definition."""


@pytest.mark.parametrize("page", ["choosing.md", *(f"methods/{name}.md" for name in sorted(METHODS))])
def test_page_defines_a_logged_quantity_where_it_is_first_named(page):
    text = " ".join(hand_written((ROOT / "docs" / page).read_text()).split())
    for name, words in DEFINED.items():
        if f"`{name}`" in text:
            first = text.index(f"`{name}`")
            assert words in text[first : first + 120], name


@pytest.mark.parametrize("name", sorted(METHODS))
def test_page_of_a_method_has_every_section(name):
    page = method_page(name)
    assert page == (ROOT / "docs" / "methods" / f"{name}.md").read_text(), (
        "run: python -m plugins.experiments.method_pages --write"
    )
    assert page.startswith(f"# {METHODS[name].title}\n")
    heads = re.findall(r"^## .*", page, re.MULTILINE)
    assert [head for head in heads if head in JUDGEMENT] == list(JUDGEMENT)
    assert heads[-3:] == list(GENERATED)
    for option, spec in METHODS[name].options.items():
        assert f"| `{option}` |" in page and spec.help.replace("|", "\\|") in page
    assert all(command in page for command in commands(name).values())
    assert set(commands(name)) == {"solo-learn", "lightly", "VISSL"}
    for module, attribute in re.findall(r"`(lightly_ext\.\w+)\.(\w+)\(", page):
        assert hasattr(importlib.import_module(module), attribute)
    assert "Transform(input_size=224)`" in page


def test_page_without_a_hand_written_part_is_made(monkeypatch, tmp_path):
    from plugins.experiments import method_pages

    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "choosing.md").write_text("")
    monkeypatch.setattr(method_pages, "ROOT", tmp_path)
    page = method_pages.method_page("mec")
    assert page.startswith("# MEC\n") and "no hand-written part" in page
    assert f"| {' | '.join([NOT_MEASURED] * 3)} |" in page


def test_published_numbers_stand_beside_ours():
    (number,) = PUBLISHED["matrix_ssl"].values()
    assert f"| `matrix_ssl`, `mec-e100_imagenet` | {number.top1} | {NOT_MEASURED} | {number.source} |" in method_page(
        "mec"
    )
    every = "\n".join(method_page(name) for name in METHODS)
    baselines = ("simclr", "dino")
    for suite, runs in PUBLISHED.items():
        for run in runs:
            if not run.startswith(baselines):
                assert f"`{suite}`, `{run}`" in every


def test_digits_are_those_of_the_page_about_choosing():
    for spec in METHODS.values():
        assert NOT_MEASURED not in digits_row(spec.title), spec.title
    assert digits_row("no such method") == [NOT_MEASURED] * 3


PARTS = {
    "EMA teacher": lambda spec: spec.teacher,
    "second head": lambda spec: facts(spec).teacher == "second head",
    "MLP predictor": lambda spec: facts(spec).predictor == "MLP",
    "closed-form predictor": lambda spec: facts(spec).predictor == "closed form",
    "prototypes": lambda spec: facts(spec).predictor == "prototypes",
    "per image": lambda spec: spec.indexed,
    "patches": lambda spec: spec.stacks > 0,
    "feature maps": lambda spec: bool(spec.taps(spec.resolve({}))),
}
"""Words in the column "Needs" of the table of all methods → whether a method has the part."""


def test_page_about_choosing_has_the_parts_of_every_method():
    text = (ROOT / "docs" / "choosing.md").read_text()
    rows = dict(re.findall(r"^\| \[.+?\]\(methods/(\w+)\.md\) \| (.+) \|$", text, re.MULTILINE))
    assert [*rows] == [*METHODS]
    for name, spec in METHODS.items():
        _, needs, views, *_ = rows[name].split(" | ")
        assert {part for part in PARTS if part in needs} == {part for part in PARTS if PARTS[part](spec)}, name
        least = {None: "two" if spec.large < 2 else "two large", 0: "none", 1: "one", 2: "two"}[spec.views]
        assert views.partition(",")[0] == least, name


def test_methods_of_the_site_are_those_of_the_package():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    (methods,) = [entry["Methods"] for entry in navigation if "Methods" in entry]
    listed = {title: page for entry in methods for title, page in entry.items()}
    assert {f"methods/{name}.md" for name in METHODS} == {
        page for page in listed.values() if page.startswith("methods/")
    }
    assert all(listed[spec.title] == f"methods/{name}.md" for name, spec in METHODS.items())
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} == set(METHODS)


def test_front_page_links_within_the_site():
    text = root_page("README.md")
    assert "](docs/" not in text and "](LICENSE)" not in text and "](contributing.md)" in text


LIGHTLY = (ROOT / "docs" / "lightly.md").read_text()
CALLS = {
    "`IndexedDataset`, `num_samples`": lambda spec, hints: spec.indexed,
    "`start_epoch`": lambda spec, hints: any(hint.frozen_epochs for hint in hints),
    "`after_backward`": lambda spec, hints: any(hint.frozen_epochs or hint.frozen_steps for hint in hints),
    "`training_parameters(lr=…)`": lambda spec, hints: any(hint.group_options() or hint.lr_constant for hint in hints),
}
"""First words of a row of lightly.md's table of calls → whether a method needs the call."""


@pytest.mark.parametrize("call", CALLS)
def test_page_of_lightly_names_the_methods_that_need_more_of_a_loop(call):
    (row,) = [line for line in LIGHTLY.splitlines() if line.startswith(f"| {call}")]
    wanted = {spec.title for spec in METHODS.values() if CALLS[call](spec, spec.hints(spec.resolve({})).values())}
    assert wanted and all(re.search(rf"\b{title}\b", row) for title in wanted), f"the row must name {sorted(wanted)}"


@pytest.mark.lightly
def test_page_of_lightly_has_every_loss_and_every_transform():
    from lightly_ext import loss, transforms

    (example,) = re.findall(r"^## A loss alone\n.*?```python\n(.*?)```", LIGHTLY, re.DOTALL | re.MULTILINE)
    missing = [name for name in loss.__all__ if f"{name}(" not in example.rpartition("import ")[2]]
    (table,) = re.findall(r"^\| Transform \|.*?\n\n", LIGHTLY, re.DOTALL | re.MULTILINE)
    missing += [name for name in transforms.__all__ if name != "TwoViewTransform" and f"`{name}`" not in table]
    assert not missing
