"""The VISSL runs of the suite ``digits``."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugins.experiments.suites import Progress, Request, Run, Step
from plugins.experiments.suites.solo import installed_configs, read_progress
from plugins.tools.command import UserError
from plugins.tools.overrides import hydra_value
from plugins.tools.records import read_json

LINEAR = "benchmark/linear_image_classification/digits/eval_resnet8_linear"
KNN = "benchmark/nearest_neighbor/digits/knn"
FEW = {"batch": 50, "epochs": 100}
"""Settings of the linear evaluation with five labels per class: one batch of all 50 images."""


def digits(request: Request) -> list[Run]:
    """List a run for each method that has a configuration for the digits.

    The untrained and the supervised backbone are run in solo-learn only, since network and training are the same.

    Args:
        request: folder, seeds and epochs.

    Returns:
        The runs, in the order in which they should start.
    """
    from plugins.methods import METHODS

    configs = installed_configs("vissl") / "config" / "pretrain"
    methods = sorted(method for method in METHODS if (configs / method / "digits.yaml").is_file())
    if not methods:
        raise UserError(f"no configuration of a method in {configs}")
    return [_run(method, seed, request) for seed in request.seeds for method in methods]


def _run(method: str, seed: int, request: Request) -> Run:
    """Pre-train, then evaluate the frozen backbone."""
    folder = request.out / "digits" / "vissl" / method / f"seed{seed}"
    data = request.data_folder / "digits"
    common = {"SEED_VALUE": seed, "DATA.TRAIN.DATA_PATHS": [data / "train"]}
    longer = {} if request.epochs is None else {"OPTIMIZER.num_epochs": request.epochs}
    pretrain = {**common, "CHECKPOINT.DIR": folder / "pretrain", **longer}
    evaluated = {
        **common,
        "DATA.TEST.DATA_PATHS": [data / "val"],
        # VISSL updates this link to the latest checkpoint
        "MODEL.WEIGHTS_INIT.PARAMS_FILE": folder / "pretrain" / "checkpoint.torch",
    }
    few = {
        "DATA.TRAIN.DATA_PATHS": [data / "train_5"],
        "DATA.TRAIN.BATCHSIZE_PER_REPLICA": FEW["batch"],
        "OPTIMIZER.num_epochs": FEW["epochs"],
        "TEST_EVERY_NUM_EPOCH": FEW["epochs"] // 2,
        "CHECKPOINT.CHECKPOINT_FREQUENCY": FEW["epochs"],
    }
    steps = (
        Step("pretrain", command(f"pretrain/{method}/digits", pretrain)),
        Step("knn", command(KNN, {**evaluated, "CHECKPOINT.DIR": folder / "knn"}, engine="knn")),
        Step("linear", command(LINEAR, {**evaluated, "CHECKPOINT.DIR": folder / "linear" / "all"})),
        Step("linear_5", command(LINEAR, {**evaluated, **few, "CHECKPOINT.DIR": folder / "linear" / "five"})),
    )
    return Run(
        framework="vissl",
        method=method,
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=steps,
        collect=collect,
        epochs=request.epochs,
        progress=progress,
    )


def command(config: str, overrides: Mapping[str, Any], engine: str = "train") -> tuple[str, ...]:
    """Compose a command of vissl_ext.

    Args:
        config: name of the configuration.
        overrides: entry below ``config`` → value; a list must hold one path.
        engine: name of VISSL's engine.
    """
    values = {
        key: f"[{hydra_value(value[0])}]" if isinstance(value, list) else hydra_value(value)
        for key, value in overrides.items()
    }
    return (
        *("-m", "vissl_ext.launch", f"config={config}"),
        *(f"config.{key}={value}" for key, value in values.items()),
        *(() if engine == "train" else (f"engine_name={engine}",)),
    )


def progress(folder: Path) -> Progress | None:
    """Read the state of the pre-training in a run's folder; None if it is not known yet."""
    config = folder / "pretrain" / "train_config.yaml"
    pattern = re.compile(r"^ *num_epochs: (\d+)$", re.MULTILINE)
    return read_progress(folder / "pretrain", lambda: "".join(pattern.findall(config.read_text())[:1]))


def collect(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from knn.json, metrics.json and summary.json in its folders.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run; accuracies are those of the last epoch.
    """
    training = read_json(run.folder / "pretrain" / "summary.json")
    (knn,) = read_json(run.folder / "knn" / "knn.json").values()
    return {
        "knn": knn["top1"],
        "linear": _last_accuracy(run.folder / "linear" / "all"),
        "linear_5": _last_accuracy(run.folder / "linear" / "five"),
        **{key: training[key] for key in ("epochs", "seconds", "images_per_second", "versions", "config")},
    }


def evaluations(folder: Path) -> list[dict[str, dict[str, float]]]:
    """Read the test accuracies of VISSL's metrics.json: ``top_1`` and other meters → name of the feature → per cent."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["test_accuracy_list_meter"] for line in lines if "test_accuracy_list_meter" in line]


def _last_accuracy(folder: Path) -> float:
    """Read the last test accuracy of a linear evaluation, in per cent."""
    (accuracy,) = evaluations(folder)[-1]["top_1"].values()
    return accuracy
