"""Generate pages of the documentation: one page per method, the front page, and the notebooks.

A method's page is docs/methods/<name>.md. Its facts, options, commands and results are generated from the method's
SPEC, configs/, :mod:`plugins.experiments.published` and the tables of docs/choosing.md. Comments mark where they
begin and end; the rest is hand-written. ``python -m plugins.experiments.method_pages --write`` updates all pages.

``mkdocs build`` loads this file as a hook, which makes the front page and the pages of notebooks; none is committed.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # mkdocs loads this file by its path
    sys.path.insert(0, str(ROOT))

from lightly_ext.names import CLASS_NAMES  # noqa: E402
from plugins.experiments.methods_table import facts  # noqa: E402
from plugins.experiments.published import MEASURED, PUBLISHED  # noqa: E402
from plugins.experiments.suites.lightly import input_size, stack_arguments  # noqa: E402
from plugins.methods import METHODS  # noqa: E402
from plugins.spec import MethodSpec  # noqa: E402

NOT_MEASURED = "not measured"
BEGIN = "<!-- generated: python -m plugins.experiments.method_pages --write -->"
END = "<!-- end of generated -->"
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages in the root of the checkout → their names on the site."""
OFF_SITE = ("LICENSE", "CITATION.cff")
"""Files that pages link to but that are not part of the site."""


def method_page(name: str) -> str:
    """Return the Markdown of a method's page: a table of facts, the hand-written part and the generated sections.

    Args:
        name: a key of METHODS. A method without a hand-written part also has a page.

    Raises:
        KeyError: METHODS has no such method.
    """
    spec = METHODS[name]
    page = _place(name)
    text = page.read_text() if page.is_file() else f"# {spec.title}\n\nThis page has no hand-written part yet.\n"
    title, _, judgement = hand_written(text).partition("\n")
    parts = [title, BEGIN, _facts(spec), END, judgement.strip(), BEGIN]
    return "\n\n".join([*parts, _options(spec), _commands(spec), _results(spec), END]) + "\n"


def hand_written(text: str) -> str:
    """Return the text of a method's page without its generated parts.

    >>> hand_written(f"# IsoLoss\\n\\n{BEGIN}\\n\\nfacts\\n\\n{END}\\n\\nIsoLoss is ...\\n")
    '# IsoLoss\\n\\nIsoLoss is ...\\n'
    """
    return re.sub(rf"{re.escape(BEGIN)}.*?{re.escape(END)}\n+", "", text, flags=re.DOTALL)


def _place(name: str) -> Path:
    return ROOT / "docs" / "methods" / f"{name}.md"


def _facts(spec: MethodSpec) -> str:
    found = facts(spec)
    least = {1: "two or more, at least one of them large", 2: "two or more large ones"}.get(spec.large)
    views = f"{least}; small crops are accepted" if spec.views is None else f"{spec.views}, of one size"
    if spec.stacks:
        views = f"{spec.stacks} stack of patches" + ("" if spec.only_stacks else f" and {spec.views} view")
    return (
        "| `method:` | predictor | teacher | views | reference |\n|---|---|---|---|---|\n"
        f"| `{spec.name}` | {found.predictor} | {found.teacher} | {views} | {found.reference} |"
    )


def _options(spec: MethodSpec) -> str:
    rows = [
        "## Options",
        "",
        "| option | default | range or choices | meaning | other names |",
        "|---|---|---|---|---|",
    ]
    for name, option in spec.options.items():
        if option.choices is not None:
            allowed = ", ".join(f"`{choice}`" for choice in option.choices)
        elif isinstance(option.default, bool):
            allowed = "`true`, `false`"
        elif option.low is None:
            allowed = ""
        elif option.high < float("inf"):
            allowed = f"{option.low:g} to {option.high:g}"
        else:
            allowed = f"at least {option.low:g}"
        default = str(option.default).lower() if isinstance(option.default, bool) else option.default
        aliases = ", ".join(f"`{alias}`" for alias in option.aliases)
        rows.append(f"| `{name}` | `{default}` | {allowed} | {_cell(option.help)} | {aliases} |")
    places = (
        f"solo-learn: `method_kwargs.<option>`. VISSL: `config.LOSS.{spec.name}.<option>`. "
        "lightly: a keyword argument of the model class, or `--option <option>=<value>`."
    )
    return "\n".join([*rows, "", places])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands(name: str) -> dict[str, str]:
    """Return framework → command that trains a method on the digits, for frameworks with a configuration."""
    found = {}
    if (ROOT / f"configs/solo/digits/{name}.yaml").is_file():
        found["solo-learn"] = (
            f"python -m solo_ext.main_pretrain --config-path configs/solo/digits --config-name {name}.yaml"
        )
    found["lightly"] = _lightly_command(name)
    if (ROOT / f"configs/vissl/config/pretrain/{name}/digits.yaml").is_file():
        found["VISSL"] = f"python -m vissl_ext.launch config=pretrain/{name}/digits config.CHECKPOINT.DIR=runs/{name}"
    return found


def _lightly_command(name: str) -> str:
    """Compose lightly's command from solo-learn's files for the digits; a method without a file uses base.yaml."""
    folder = ROOT / "configs/solo/digits"
    settings: dict[str, Any] = {}
    for file in ("base", "teacher/ema", name):
        path = folder / f"{file}.yaml"
        _merge(settings, yaml.safe_load(path.read_text()) if path.is_file() else {})
    optimizer, views = settings["optimizer"], settings["augmentations"]
    options = {**settings.get("method_kwargs", {}), **settings["momentum"]}
    words = {
        "val-dir": "datasets/digits/val",
        "backbone": settings["backbone"]["name"],
        "input-size": input_size(views[0]),
        "num-workers": settings["data"]["num_workers"],
        "epochs": settings["max_epochs"],
        "warmup-epochs": settings["scheduler"]["warmup_epochs"],
        "batch-size-per-device": optimizer["batch_size"],
        "optimizer": optimizer["name"],
        "lr": optimizer["lr"],
        "weight-decay": optimizer["weight_decay"],
    }
    lines = [f"python -m lightly_ext.benchmarks --methods {name} --train-dir datasets/digits/train"]
    for word in [*(f"--{key} {value}" for key, value in words.items()), "--skip-finetune-eval"]:
        if len(lines[-1]) + len(word) < 100:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    for flag, pairs in {"transform": stack_arguments(views), "option": options}.items():
        if pairs:
            lines.append(f"    --{flag} " + " ".join(f"{key}={value}" for key, value in pairs.items()))
    return " \\\n".join(lines)


def _merge(settings: dict[str, Any], other: dict[str, Any]) -> None:
    """Overwrite entries, at every depth of nested dictionaries."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value


def _commands(spec: MethodSpec) -> str:
    parts = [
        "## Commands",
        "",
        "`python -m plugins.tools.data digits` writes the images once. Then, in each framework:",
    ]
    for framework, command in commands(spec.name).items():
        parts += ["", f"{framework}:", "", "```bash", command, "```"]
    solo = sorted(path.parent.name for path in ROOT.glob(f"configs/solo/*/{spec.name}.yaml"))
    vissl = sorted(path.stem for path in ROOT.glob(f"configs/vissl/config/pretrain/{spec.name}/*.yaml"))
    listed = [f"`configs/solo/{folder}/{spec.name}.yaml`" for folder in solo]
    listed += [f"`config=pretrain/{spec.name}/{stem}`" for stem in vissl]
    if listed:
        parts += ["", f"All configurations: {', '.join(listed)}."]
    (class_name,) = [name for name, known in CLASS_NAMES.items() if known.name == spec.name]
    parts += [
        "",
        f"In a script for lightly: `lightly_ext.models.{class_name}(backbone)`, with the views of "
        f"`lightly_ext.transforms.{class_name}Transform(input_size=224)`.",
    ]
    suite = f"./run_experiments.sh digits --framework lightly --only {spec.name} --dry-run"
    parts += ["", f"`{suite}` prints lightly's command with the augmentations that solo-learn and VISSL use."]
    return "\n".join(parts)


def _results(spec: MethodSpec) -> str:
    """Return the section with published accuracies and ours, and our results on the digits."""
    parts = ["## Results", ""]
    rows = []
    for suite, runs in PUBLISHED.items():
        for run, number in runs.items():
            if run.rpartition("_")[0].partition("-")[0] != spec.name:
                continue
            ours = MEASURED.get(suite, {}).get(run)
            shown = NOT_MEASURED if ours is None else f"{ours:.1f}"
            rows.append(f"| `{suite}`, `{run}` | {number.top1:g} | {shown} | {_cell(number.source)} |")
    if rows:
        parts += ["Top-1 accuracy (%) of a linear classifier on the frozen backbone:", ""]
        parts += [
            "| suite, run | published | ours | source of the published number |",
            "|---|---:|---:|---|",
            *rows,
            "",
        ]
    else:
        parts += ["No suite has published numbers for this method.", ""]
    digits = digits_row(spec.title)
    parts += [
        "Our results on the digits, kNN accuracy (%) with seeds 0 / 1 / 2; there are no published results:",
        "",
    ]
    parts += ["| solo-learn | VISSL | lightly |", "|---|---|---|", f"| {' | '.join(digits)} |"]
    return "\n".join(parts)


def digits_row(title: str) -> list[str]:
    """Return the cells of a method in the table of docs/choosing.md that has one column per framework.

    Args:
        title: title of the method, as in the first column of the table.

    Returns:
        The cells of solo-learn, VISSL and lightly; "not measured" for a missing one.
    """
    inside = False
    for line in (ROOT / "docs" / "choosing.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if cells[1:] == ["solo-learn", "VISSL", "lightly"]:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and cells[0] == title:
            return [cell or NOT_MEASURED for cell in cells[1:4]]
    return [NOT_MEASURED] * 3


def root_page(name: str) -> str:
    """Return a page in the root of the checkout with links converted for the site: ``docs/x.md`` becomes ``x.md``."""
    return _links((ROOT / name).read_text().replace("](docs/", "]("))


def _links(text: str) -> str:
    text = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", text)
    for source, target in ROOT_PAGES.items():
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(source)}(#[^)]*)?\)", rf"]({target}\1)", text)
    for name in OFF_SITE:
        text = re.sub(rf"\[((?:!\[[^]]*\]\([^)]*\)|[^][])+)\]\((?:\.\./)*{re.escape(name)}\)", r"\1", text)
    return text


def notebook_page(path: Path) -> str:
    """Return the Markdown of a notebook with its text and image outputs."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                parts.append(f"![Output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text:
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/ (hook of MkDocs)."""
    from mkdocs.structure.files import File

    made = {target: root_page(source) for source, target in ROOT_PAGES.items()}
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{path.stem}.md"] = notebook_page(path)
    for place, text in made.items():
        present = files.get_file_from_path(place)
        if present is not None:
            files.remove(present)
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Convert links from docs/ to the root of the checkout into links within the site (hook of MkDocs)."""
    return _links(markdown)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the page of one method, or update the pages of all methods."""
    parser = argparse.ArgumentParser(prog="python -m plugins.experiments.method_pages", description=main.__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("method", nargs="?", choices=sorted(METHODS))
    action.add_argument("--write", action="store_true", help="write docs/methods/<name>.md of every method")
    options = parser.parse_args(argv)
    if not options.write:
        print(method_page(options.method), end="")
        return
    for name in METHODS:
        _place(name).write_text(method_page(name))


if __name__ == "__main__":
    main()
