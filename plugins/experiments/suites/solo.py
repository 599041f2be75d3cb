"""The suites that run in solo-learn: ``digits``, ``implicit_var_reg`` and ``ssl_ey``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plugins.experiments.results import ACCURACY, LOSSES
from plugins.experiments.suites import Progress, Request, Run, Step
from plugins.tools.command import UserError
from plugins.tools.overrides import hydra_value
from plugins.tools.records import read_json, read_rows
from plugins.tools.shipped import shipped_configs

# ------------------------------------------------------------------------------------------------------ data sets


class Data(NamedTuple):
    """Settings of a data set in the suites.

    Args:
        configs: folder of its YAML files in configs/solo.
        train, val: paths of its images, relative to the folder of data sets.
        workers: number of data loader workers for kNN.
        linear: whether its runs end with a linear evaluation. Without it, the online classifier gives the accuracy.
        gpus: number of GPUs in its YAML files.
    """

    configs: str
    train: str
    val: str
    workers: int = 4
    linear: bool = False
    gpus: int = 1


DATA = {
    "cifar10": Data("cifar", ".", "."),
    "cifar100": Data("cifar", ".", "."),
    "stl10": Data("stl10", ".", "."),
    "tinyimagenet": Data("tinyimagenet", "tinyimagenet/train", "tinyimagenet/val"),
    "imagenet100": Data("imagenet100", "imagenet100/train", "imagenet100/val", workers=8, linear=True),
    "imagenet": Data("imagenet", "imagenet/train", "imagenet/val", workers=8, linear=True, gpus=8),
    "digits": Data("digits", "digits/train", "digits/val", workers=0, linear=True, gpus=0),
}


KNN: dict[str, float] = {"k": 20, "temperature": 0.07}
"""Number of neighbours, and temperature of their weights."""

RESUME = {"auto_resume.enabled": True, "auto_resume.max_hours": 24 * 365}
"""Overrides with which a training continues after an interruption, also after days in the queue of a cluster."""


def prepare(runs: Sequence[Run], request: Request) -> list[tuple[str, ...]]:
    """List the commands that create or check the data sets of the runs.

    Args:
        runs: the runs that are not finished.
        request: the folder of the data sets.
    """
    wanted = dict.fromkeys(run.dataset for run in runs)
    others = [name for name in wanted if name != "digits"]
    commands: list[tuple[str, ...]] = []
    if others:
        options = ("--folder", str(request.data_folder), *(["--elsewhere"] if request.elsewhere else []))
        commands.append(("-m", "plugins.experiments.suites.prepare", *others, *options))
    if "digits" in wanted:
        commands.append(("-m", "plugins.tools.data", "digits", "--out", str(request.data_folder / "digits")))
    return commands


def one_at_a_time(request: Request) -> int | None:
    """Return the number of concurrent runs: 1, because each needs the GPU; None (one per core) on the digits."""
    return None if request.data is not None and set(request.data) == {"digits"} else 1


def gpu_count(dataset: str, request: Request) -> int:
    """Return the number of GPUs of a pre-training; 0 on the digits, whose ``devices`` are processes on the CPU."""
    return DATA[dataset].gpus and (request.devices or DATA[dataset].gpus)


# --------------------------------------------------------------------------------------------------------- digits


def digits(request: Request) -> list[Run]:
    """List a run for each method that has a YAML file for the digits, and for an untrained and a supervised backbone.

    Args:
        request: folder, seeds and epochs.

    Returns:
        The runs, in the order in which they should start.
    """
    configs = config_folder("digits")
    methods = methods_of(configs)
    runs = []
    for seed in request.seeds:
        runs.append(_digits_pretrained("untrained", seed, None, configs, request))
        runs += [_digits_pretrained(method, seed, request.epochs, configs, request) for method in methods]
        runs.append(_digits_supervised(seed, request.epochs, configs, request))
    return runs


def _digits_pretrained(method: str, seed: int, epochs: int | None, configs: Path, request: Request) -> Run:
    """Pre-train, then evaluate the frozen backbone."""
    base = request.out / "digits" / "solo"
    folder = base / method / f"seed{seed}"
    train, few = (_digits_data(request, split) for split in ("train", "train_5"))
    pretrain = command(
        "main_pretrain",
        configs,
        method,
        {
            "seed": seed,
            "checkpoint.dir": base,
            "checkpoint.version": f"seed{seed}",
            **RESUME,
            **train,
            **({} if epochs is None else {"max_epochs": epochs}),
        },
    )
    linear = {"seed": seed, "pretrained_feature_extractor": folder, "checkpoint.dir": folder}
    return Run(
        framework="solo",
        method=method,
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", pretrain),
            knn_step(folder, folder, "digits", request),
            linear_step("linear", configs, "linear", {**linear, "checkpoint.version": "all", **train}),
            linear_step("linear_5", configs, "linear_5", {**linear, "checkpoint.version": "five", **few}),
        ),
        collect=collect_digits,
        epochs=epochs,
        progress=progress,
    )


def _digits_supervised(seed: int, epochs: int | None, configs: Path, request: Request) -> Run:
    """Train backbone and classifier with labels, from the weights of the untrained run."""
    folder = request.out / "digits" / "solo" / "supervised" / f"seed{seed}"
    untrained = request.out / "digits" / "solo" / "untrained" / f"seed{seed}"
    start = {"seed": seed, "pretrained_feature_extractor": untrained, "checkpoint.dir": folder}
    train, few = (_digits_data(request, split) for split in ("train", "train_5"))
    longer = {} if epochs is None else {"max_epochs": epochs}
    return Run(
        framework="solo",
        method="supervised",
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=(
            linear_step("train", configs, "supervised", {**start, "checkpoint.version": "all", **train, **longer}),
            knn_step(folder / "linear" / "all", folder, "digits", request),
            linear_step("train_5", configs, "supervised_5", {**start, "checkpoint.version": "five", **few}),
        ),
        collect=collect_digits,
        needs=(f"solo/untrained/seed{seed}",),
        epochs=epochs,
    )


def _digits_data(request: Request, split: str) -> dict[str, Path]:
    folder = request.data_folder / "digits"
    return {"data.train_path": folder / split, "data.val_path": folder / "val"}


def collect_digits(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from knn.json, linear.json and pretrain.json in its folder.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run. Accuracies are those of the last epoch, since choosing
        the best epoch would use the validation labels.
    """
    linear = read_json(run.folder / "linear" / "all" / "linear.json")
    pretrain = run.folder / "pretrain.json"
    training = read_json(pretrain) if pretrain.is_file() else linear
    return {
        "epochs": training.get("epochs"),
        "knn": read_json(run.folder / "knn.json")[0]["acc1"],
        "linear": linear["acc1"],
        "linear_5": read_json(run.folder / "linear" / "five" / "linear.json")["acc1"],
        **training_entries(training),
    }


# ------------------------------------------------------------------------------------- implicit_var_reg and ssl_ey


class Variant(NamedTuple):
    """A row of a published table.

    Args:
        name: name in the publication, the first part of the run's name.
        config: name of the YAML file.
        overrides: Hydra overrides of the YAML file.
    """

    name: str
    config: str
    overrides: tuple[str, ...] = ()


_NO_TEACHER = ("teacher=none",)
IMPLICIT_VAR_REG = (
    Variant("byol", "byol"),
    Variant("simsiam", "byol", _NO_TEACHER),
    Variant("directpred", "directpred"),
    Variant("directpred-noema", "directpred", _NO_TEACHER),
    Variant("isoloss", "isoloss"),
    Variant("isoloss-noema", "isoloss", _NO_TEACHER),
    Variant("directcopy", "directcopy"),
    Variant("directcopy-noema", "directcopy", _NO_TEACHER),
    Variant("directcopy-isocopy", "isocopy"),
    Variant("directcopy-isocopy-noema", "isocopy", _NO_TEACHER),
)
"""The runs of the table in arXiv:2212.04858, with the names of its script. Its SimSiam is BYOL without the teacher."""
IMPLICIT_VAR_REG_DATA = ("cifar10", "cifar100", "stl10", "tinyimagenet")

SSL_EY = (Variant("ssl_ey", "ssl_ey"), Variant("ssl_ey-no-projector", "ssl_ey_no_projector"))
SSL_EY_DATA = ("cifar10", "cifar100", "imagenet100")


def implicit_var_reg(request: Request) -> list[Run]:
    """List the runs of ten methods on four data sets."""
    return _table("implicit_var_reg", IMPLICIT_VAR_REG, request.data or IMPLICIT_VAR_REG_DATA, request)


def ssl_ey(request: Request) -> list[Run]:
    """List the runs of SSL-EY with and without projector on three data sets."""
    return _table("ssl_ey", SSL_EY, request.data or SSL_EY_DATA, request)


def _table(suite: str, variants: Sequence[Variant], datasets: Sequence[str], request: Request) -> list[Run]:
    return [
        _table_run(suite, variant, dataset, seed, request)
        for seed in request.seeds
        for variant in variants
        for dataset in datasets
    ]


def _table_run(suite: str, variant: Variant, dataset: str, seed: int, request: Request) -> Run:
    """Pre-train with an online classifier; then kNN and, for some data sets, a linear evaluation."""
    base, label, data = request.out / suite / "solo", f"{variant.name}_{dataset}", DATA[dataset]
    configs, folder = config_folder(data.configs), base / label / f"seed{seed}"
    places = {
        "data.dataset": dataset,
        "data.train_path": request.data_folder / data.train,
        "data.val_path": request.data_folder / data.val,
    }
    overrides = pretraining(base, label, seed, places, request)
    if request.epochs is not None:
        overrides.update(requested_epochs(request.epochs))
    steps = [
        Step("pretrain", command("main_pretrain", configs, variant.config, overrides, variant.overrides)),
        knn_step(folder, folder, dataset, request),
    ]
    if data.linear:
        start = {"pretrained_feature_extractor": folder, "checkpoint.dir": folder, "checkpoint.version": "all"}
        steps.append(linear_step("linear", configs, "linear", {"seed": seed, **places, **start}))
    return Run(
        framework="solo",
        method=variant.name,
        dataset=dataset,
        seed=seed,
        folder=folder,
        steps=tuple(steps),
        collect=collect_table,
        epochs=request.epochs,
        progress=progress,
        gpus=gpu_count(dataset, request),
        label=label,
    )


def collect_table(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run of a table from pretrain.json, knn.json and, if it exists, linear.json.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run. Accuracies are those of the last epoch.
    """
    training = read_json(run.folder / "pretrain.json")
    linear = run.folder / "linear" / "all" / "linear.json"
    evaluated = read_json(linear) if linear.is_file() else {}
    return {
        "epochs": training["epochs"],
        "online": training["metrics"]["val_acc1"],
        "online_top5": training["metrics"].get("val_acc5"),
        "knn": read_json(run.folder / "knn.json")[0]["acc1"],
        "linear": evaluated.get("acc1"),
        "linear_top5": evaluated.get("acc5"),
        **training_entries(training),
    }


# ------------------------------------------------------------------------------------------------------- commands


def config_folder(dataset: str) -> Path:
    """Return the folder of our YAML files for a data set in solo-learn.

    Raises:
        UserError: the configurations are not installed.
    """
    return installed_configs("solo") / dataset


def methods_of(configs: Path) -> list[str]:
    """List the methods that have a YAML file in a folder."""
    from plugins.methods import METHODS

    return sorted(method for method in METHODS if (configs / f"{method}.yaml").is_file())


def installed_configs(framework: str) -> Path:
    """Return the folder of our configurations for a framework.

    It is ``configs/<framework>`` in the working directory or, if that does not exist, the folder that comes with this
    package.

    Raises:
        UserError: neither folder exists.
    """
    here = Path("configs") / framework
    if here.is_dir():
        return here
    if (shipped := shipped_configs(framework)).is_dir():
        return shipped
    raise UserError(f"there is no folder {here}, nor is one installed with {framework}_ext; run this from the checkout")


def command(
    module: str, configs: Path, name: str, overrides: Mapping[str, Any], more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Compose a command of solo_ext.

    Args:
        module: name of the module in solo_ext.
        configs: folder of YAML files.
        name: name of a file in it, without suffix.
        overrides: entry → value.
        more: further overrides, as Hydra's command line takes them.
    """
    return (
        *("-m", f"solo_ext.{module}", "--config-path", str(configs), "--config-name", f"{name}.yaml"),
        *more,
        *(f"++{key}={hydra_value(value)}" for key, value in overrides.items()),
    )


def pretraining(base: Path, label: str, seed: int, places: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Return the overrides of a pre-training in ``base/label/seed<n>`` that resumes after an interruption.

    Args:
        base: folder of the suite's runs.
        label: name of the run in this folder.
        seed: seed of the run.
        places: overrides with the paths of the images.
        request: number of devices.
    """
    overrides = {
        "name": label,
        "seed": seed,
        **places,
        "checkpoint.dir": base,
        "checkpoint.group": label,
        "checkpoint.version": f"seed{seed}",
        **RESUME,
    }
    if request.devices is not None:
        overrides["devices"] = request.devices
    return overrides


def requested_epochs(epochs: int) -> dict[str, int]:
    """Return the overrides for a number of epochs from the command line.

    Every epoch is validated, so that the last one is.
    """
    return {"max_epochs": epochs, "check_val_every_n_epoch": 1}


def linear_step(step: str, configs: Path, name: str, overrides: Mapping[str, Any]) -> Step:
    """Return the step of a linear evaluation or of a supervised training."""
    return Step(step, command("main_linear", configs, name, {**overrides, **RESUME}))


def knn_step(checkpoints: Path, folder: Path, dataset: str, request: Request) -> Step:
    """Return the step of the kNN evaluation of the backbone's features with 20 neighbours.

    Args:
        checkpoints: folder of the checkpoint.
        folder: folder of knn.json.
        dataset: name of the data set.
        request: the folder of the data sets.
    """
    data = DATA[dataset]
    options = {
        "pretrained_checkpoint_dir": checkpoints,
        "dataset": dataset,
        "train_data_path": request.data_folder / data.train,
        "val_data_path": request.data_folder / data.val,
        **KNN,
        "distance_function": "cosine",
        "feature_type": "backbone",
        "num_workers": data.workers,
        "output": folder / "knn.json",
    }
    flags = (text for key, value in options.items() for text in (f"--{key}", str(value)))
    return Step("knn", ("-m", "solo_ext.main_knn", *flags))


def read_progress(folder: Path, epochs: Callable[[], Any]) -> Progress | None:
    """Read the number of finished epochs, and the latest loss and online accuracy, from metrics.csv in a folder.

    Args:
        folder: folder of the pre-training.
        epochs: returns the total number of epochs, or raises an error if its file is not complete yet.

    Returns:
        The state of the pre-training; None if a file does not exist yet, is incomplete, or contains no epoch.
    """
    try:
        rows = [row for row in read_rows(folder / "metrics.csv") if row.get("epoch")]
        finished = int(max(float(row["epoch"]) for row in rows)) + 1
        losses = [float(row[name]) for row in rows for name in LOSSES if row.get(name)]
        accuracies = [float(row[ACCURACY]) for row in rows if row.get(ACCURACY)]
        latest = (values[-1] if values else None for values in (losses, accuracies))
        return Progress(finished, int(epochs()), *latest)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def progress(folder: Path) -> Progress | None:
    """Read the state of the pre-training in a folder; None if it is not known yet."""
    return read_progress(folder, lambda: read_json(folder / "args.json")["max_epochs"])


def training_entries(training: Mapping[str, Any]) -> dict[str, Any]:
    """Select the entries of result.json that describe the pre-training."""
    return {key: training.get(key) for key in ("images_per_second", "seconds", "versions", "config")}
