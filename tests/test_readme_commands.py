"""Each command that the README of an original repository prints, or a script that it names, is in docs/migration.md.

The commands are written down here. READMES_CHECKOUTS may name a folder with the checkouts implicit-var-reg,
solo-learn-ssley, vicreg, Matrix-SSL, Invariant-Self-Supervised-Learning and Self-Supervised-Vision; then their own
files are read and compared.
"""

import ast
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CHECKOUTS = "READMES_CHECKOUTS"

_HUB = "torch.hub.load('YannDubs/Invariant-Self-Supervised-Learning:main', "
_TIN = "bin/tinyimagenet/"
_DIST = "--multiprocessing-distributed --world-size 1 --rank 0"
_EVALUATE = "python evaluate.py --data-dir PATH --pretrained PATH --exp-dir PATH"
_FINETUNE = f"{_EVALUATE} --weights finetune --train-percent"
_VARIANTS = {
    "byol": "byol",
    "simsiam": "byol-noema",
    **{name: name for name in ("directpred", "directpred-noema", "isoloss", "isoloss-noema")},
    "directcopy": "directpred",
    "directcopy-noema": "directpred-noema",
    "directcopy-isocopy": "isoloss",
    "directcopy-isocopy-noema": "isoloss-noema",
}
"""Run of run_experiments.sh → its YAML file."""
_DATA = {"cifar10": "cifar", "cifar100": "cifar", "stl10": "stl-10", "tinyimagenet": "tinyimagenet"}
"""Data set → its folder of YAML files."""


class Printed(NamedTuple):
    """A command of an original.

    Args:
        repository: folder of its checkout.
        file: file that prints it.
        line: the line.
        text: the command in the form of :func:`normal`.
        tests: the tests that run our command on small data.
    """

    repository: str
    file: str
    line: int
    text: str
    tests: tuple[str, ...]


_FORKS, _WEIGHTS = "tests/solo/test_forks.py", "tests/tools/test_weights.py"
_IMAGENET100 = (
    "--dataset imagenet100 --train_data_path ./datasets/imagenet-100/train --val_data_path ./datasets/imagenet-100/val "
    "--batch_size 16 --num_workers 10 --pretrained_checkpoint_dir RUN"
)
_DISSL, _RECIPE = "tests/experiments/test_suites_dissl.py", "tests/test_vicreg_recipe.py"
_MATRIX = "tests/experiments/test_suites_matrix_ssl.py::test_a_trial_on_the_digits_goes_through_all_steps"
_VICREG = (f"{_RECIPE}::test_solo_commands_run", "tests/vissl/test_vicreg.py::test_commands_run")
_SSV = (
    "tests/solo/test_ssv.py::test_every_algorithm_trains",
    "tests/solo/test_ssv_tasks.py::test_train_on_two_devices_then_linear_eval_then_get_features",
)
_ISSL, _VIC, _MSSL = "Invariant-Self-Supervised-Learning", "vicreg", "Matrix-SSL"
PRINTED = [
    Printed(
        *("implicit-var-reg", "README.md", 30),
        "python3 main_pretrain.py --config-path scripts/pretrain/cifar/ --config-name isoloss.yaml",
        (f"{_FORKS}::test_the_forty_commands_of_run_experiments_train",),
    ),
    Printed(
        *("solo-learn-ssley", "README.md", 172),
        "python3 main_pretrain.py --config-path scripts/pretrain/imagenet-100/ --config-name barlow.yaml",
        (f"{_FORKS}::test_linear_evaluation_of_the_branch_ssley",),
    ),
    Printed(
        *("solo-learn-ssley", "scripts/knn/imagenet-100/knn.sh", 1),
        f"python3 main_knn.py {_IMAGENET100} --k 1 2 5 10 20 50 100 200 --temperature 0.01 0.02 0.05 0.07 0.1 0.2 0.5 "
        "1 --feature_type backbone projector --distance_function euclidean cosine",
        (f"{_FORKS}::test_knn_sh_of_the_branch_ssley",),
    ),
    Printed(
        *("solo-learn-ssley", "scripts/umap/imagenet-100/umap.sh", 1),
        f"python3 main_umap.py {_IMAGENET100}",
        ("tests/solo/test_umap.py::test_umap_sh_of_the_branch_ssley",),
    ),
    Printed(
        _ISSL, "README.md", 32, f"{_HUB}'dissl_resnet50_d8192_e800_m8')", (f"{_WEIGHTS}::test_hub_has_every_name",)
    ),
    Printed(_ISSL, "notebooks/torchhub.ipynb", 0, f"{_HUB}'preprocessor')", (f"{_WEIGHTS}::test_preprocessor",)),
    *(
        Printed(_ISSL, "README.md", line + after, f"{_TIN}{script}.sh{options}", (f"{_DISSL}::{test}",))
        for script, line, test in (
            ("table1_distillation", 79, "test_table_1_on_the_digits"),
            ("fig7c_dimensions", 99, "test_figure_7c_on_the_digits"),
            ("table1_contrastive", 128, "test_table_1_on_the_digits"),
        )
        for after, options in enumerate((" -s none", ' -v "" -a is_force_gpu=False'))
    ),
    Printed(_ISSL, "README.md", 152, f"{_TIN}fig7a_augmentations.sh", (f"{_DISSL}::test_figure_7a_on_the_digits",)),
    Printed(
        *(_VIC, "README.md", 72),
        "python -m torch.distributed.launch --nproc_per_node=8 main_vicreg.py --data-dir PATH --exp-dir PATH "
        "--arch resnet50 --epochs 100 --batch-size 512 --base-lr 0.3",
        (*_VICREG, f"{_RECIPE}::test_lightly_commands_run"),
    ),
    Printed(
        *(_VIC, "README.md", 80),
        "python run_with_submitit.py --nodes 4 --ngpus 8 --data-dir PATH --exp-dir PATH --arch resnet50 --epochs 1000 "
        "--batch-size 2048 --base-lr 0.2",
        _VICREG,
    ),
    Printed(_VIC, "README.md", 91, f"{_EVALUATE} --lr-head 0.02", (*_VICREG, f"{_RECIPE}::test_lightly_commands_run")),
    *(
        Printed(
            *(_VIC, "README.md", line),
            f"{_FINETUNE} {percent} --epochs 20 --lr-backbone {backbone} --lr-head {head} --weight-decay 0",
            _VICREG[:1],
        )
        for line, percent, backbone, head in ((99, 1, 0.03, 0.08), (105, 10, 0.01, 0.1))
    ),
    Printed(
        *(_MSSL, "README.md", 23),
        f"python main_pretrain.py -a resnet50 --dist-url tcp://localhost:10501 {_DIST} "
        "--mce_mu 1.0 --mce_lambd 1.0 --gamma 1.0 PATH",
        (_MATRIX,),
    ),
    Printed(
        *(_MSSL, "README.md", 34),
        f"python main_lincls.py -a resnet50 --dist-url tcp://localhost:10051 {_DIST} --pretrained PATH --lars PATH",
        (_MATRIX,),
    ),
    Printed(
        *("Self-Supervised-Vision", "README.md", 25),
        "python main.py --config configs/<model>.yaml --algo <model> --arch <arch> --task train",
        _SSV,
    ),
]


FURTHER = {
    "implicit-var-reg/README.md": ["pip3 install -r requirements.txt"],
    "solo-learn-ssley/README.md": ["pip3 install .[dali,umap,h5]"],
    "vicreg/README.md": [
        "pip install submitit",
        *(
            f"torch.hub.load('facebookresearch/vicreg:main', '{name}')"
            for name in ("resnet50", "resnet50x2", "resnet200x2")
        ),
    ],
    "Matrix-SSL/README.md": ["conda env create -f environment_ssl.yaml"],
    "Invariant-Self-Supervised-Learning/README.md": [
        *("pip install -r requirements.txt", "conda env update --file environment.yaml"),
        *("bin/tinyimagenet/*.sh -s <server_name>", "minimal_dissl.ipynb", "minimal_cissl.ipynb", "torchhub.ipynb"),
    ],
    "Invariant-Self-Supervised-Learning/notebooks/torchhub.ipynb": [
        'torch.hub.list("YannDubs/Invariant-Self-Supervised-Learning:main")'
    ],
}
"""File of an original → what it prints that installs, or has another form here."""


def normal(text: str) -> str:
    """Return a text with one space between words, without continued lines, quotes of addresses and own paths.

    The two options that the script of VICReg rejects have the names that it accepts.
    """
    text = re.sub(r"\\ *\n", " ", text).replace("$1", "RUN")
    text = re.sub(r"'(tcp:[^']*)'", r"\1", text).replace("--train-perc ", "--train-percent ")
    text = text.replace("--lr-classifier ", "--lr-head ")
    text = re.sub(r"(--(?:data-dir|exp-dir|pretrained)) \S+", r"\1 PATH", text)
    text = re.sub(r"(--gamma 1\.0|--lars|--rank 0) (?:/path/\S*|IMAGENET)", r"\1 PATH", " ".join(text.split()))
    return " ".join(text.split())


@pytest.fixture(scope="module")
def page() -> str:
    return normal((ROOT / "docs" / "migration.md").read_text())


@pytest.mark.parametrize(
    "printed", PRINTED, ids=lambda printed: f"{printed.repository}-{printed.line}-{printed.text[:40]}"
)
def test_the_page_has_the_command(printed: Printed, page: str) -> None:
    assert printed.text in page
    for name in printed.tests:
        file, _, function = name.partition("::")
        tests = {each.name for each in ast.parse((ROOT / file).read_text()).body if isinstance(each, ast.FunctionDef)}
        assert function in tests, f"{file} has no {function}, which runs: {printed.text}"


@pytest.mark.parametrize("file", FURTHER)
def test_the_page_has_what_has_another_form_here(file: str, page: str) -> None:
    assert not [text for text in FURTHER[file] if text not in page]


def _options(name: str) -> str:
    """Options of a run of run_experiments.sh, from the name of the YAML file on, for the data set DATA."""
    more = "" if name in ("byol", "simsiam") else " optimizer.weight_decay=1e-4"
    more += " method_kwargs.dp_alpha=1 method_kwargs.eps_iso=0.25" if name.startswith("directcopy") else ""
    return f"{_VARIANTS[name]}.yaml data.dataset=DATA name={name}_DATA{more}"


@pytest.mark.parametrize("name", _VARIANTS)
def test_the_page_has_the_forty_commands(name: str, page: str) -> None:
    """One row for each variant, for the four data sets."""
    assert f"| `{_options(name)}` | `{name}_DATA` |" in page


def _checkout(name: str) -> Path:
    root = os.environ.get(CHECKOUTS)
    if not root:
        pytest.skip(f"NOT TESTED: the originals' own READMEs, since {CHECKOUTS} names no folder of their checkouts")
    found = Path(root) / name
    assert found.is_dir(), f"{CHECKOUTS}={root} has no {name}"
    return found


@pytest.mark.parametrize("name", sorted({printed.repository for printed in PRINTED}))
def test_the_readme_prints_these_commands_and_no_others(name: str) -> None:
    own = [printed for printed in PRINTED if printed.repository == name]
    folder = _checkout(name)
    for printed in own:
        text = (folder / printed.file).read_text()
        assert printed.text in normal(re.sub(r"^ *#.*\n", "", text, flags=re.MULTILINE)), printed
        if printed.line:
            assert printed.text.split()[0] in text.splitlines()[printed.line - 1], printed
    found = re.findall(
        r"^\$? ?(?:python3? \S.*)$|`(bin/\S+\.sh[^`]*)`", (folder / "README.md").read_text(), re.MULTILINE
    )
    starts = len([one for one in found if "*" not in one and "<server" not in one])
    assert starts == len([printed for printed in own if printed.file == "README.md" and "hub" not in printed.text])


@pytest.mark.parametrize("file", FURTHER)
def test_the_original_prints_what_has_another_form_here(file: str) -> None:
    name, _, rest = file.partition("/")
    text = (_checkout(name) / rest).read_text().replace('\\"', '"')  # of a notebook
    assert not [each for each in FURTHER[file] if each not in text]


def test_the_script_has_these_forty_commands() -> None:
    text = normal((_checkout("implicit-var-reg") / "run_experiments.sh").read_text())
    commands = {" ".join(each.split()) for each in re.findall(r"python3 main_pretrain\.py ([^&#]*)", text)}
    wanted = {
        f"--config-path scripts/pretrain/{folder}/ --config-name {_options(name).replace('DATA', dataset)}"
        for name in _VARIANTS
        for dataset, folder in _DATA.items()
    }
    assert commands == wanted and len(wanted) == 40
