"""The suite ``matrix_ssl``: Matrix-SSL and MEC on ImageNet, in solo-learn and in VISSL.

A run pre-trains a ResNet-50, trains a linear classifier on it by the protocol of the two papers (LARC, normalised
features), and exports the backbone to detectron2. The training on COCO is started manually: see configs/detectron2. On
the digits, the same commands run within minutes, as a trial.
"""

from pathlib import Path
from typing import Any

from plugins.experiments.suites import Request, Run, Step, solo, vissl
from plugins.tools.records import read_json

METHODS = ("matrix_ssl", "mec")
EPOCHS = (100, 200, 400)
"""Numbers of epochs of the published pre-trainings."""
DATA = ("imagenet",)
_RESNET50 = 2048
"""Width of the features of a ResNet-50."""


def in_solo(request: Request) -> list[Run]:
    """List the runs in solo-learn.

    Args:
        request: folder, seeds, epochs, devices and data. ``epochs`` replaces the three published numbers of epochs.
    """
    return [_solo_run(*which, request) for which in _table(request)]


def in_vissl(request: Request) -> list[Run]:
    """List the runs in VISSL.

    Args:
        request: as in :func:`in_solo`.
    """
    return [_vissl_run(*which, request) for which in _table(request)]


def _table(request: Request) -> list[tuple[str, str, int | None, int]]:
    """Return method, data set, epochs (None: the value of the YAML file) and seed of each run."""
    return [
        (method, dataset, epochs, seed)
        for seed in request.seeds
        for dataset in request.data or DATA
        for method in METHODS
        for epochs in ([request.epochs] if request.epochs or dataset == "digits" else EPOCHS)
    ]


def label(method: str, dataset: str, epochs: int | None) -> str:
    """Return the name of a run within the suite.

    >>> label("mec", "imagenet", 200), label("mec", "digits", None)
    ('mec-e200_imagenet', 'mec_digits')
    """
    return f"{method}-e{epochs}_{dataset}" if epochs else f"{method}_{dataset}"


def _export(checkpoint: Path, folder: Path) -> Step:
    return Step(
        "export", ("-m", "plugins.tools.export", str(checkpoint), "--to", "detectron2", str(folder / "backbone.pkl"))
    )


def _solo_run(method: str, dataset: str, epochs: int | None, seed: int, request: Request) -> Run:
    base, name = request.out / "matrix_ssl" / "solo", label(method, dataset, epochs)
    folder, configs = base / name / f"seed{seed}", solo.config_folder(solo.DATA[dataset].configs)
    places = {
        "data.train_path": request.data_folder / solo.DATA[dataset].train,
        "data.val_path": request.data_folder / solo.DATA[dataset].val,
        "backbone.name": "resnet50",
    }
    pretrain = solo.pretraining(base, name, seed, places, request)
    if epochs is not None:
        pretrain["max_epochs"] = epochs
    linear = {
        "seed": seed,
        **places,
        "pretrained_feature_extractor": folder,
        "checkpoint.dir": folder,
        "checkpoint.version": "all",
    }
    return Run(
        framework="solo",
        method=method,
        dataset=dataset,
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", solo.command("main_pretrain", configs, method, pretrain)),
            solo.linear_step("linear", configs, "linear_normalized", linear),
            _export(folder, folder),
        ),
        collect=collect_solo,
        epochs=epochs,
        label=name,
        progress=solo.progress,
        gpus=solo.gpu_count(dataset, request),
    )


def collect_solo(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from pretrain.json and linear.json.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run. ``linear`` is the accuracy of the last epoch, as in
        every suite; ``linear_best`` is that of the best epoch, as the papers report.
    """
    training = read_json(run.folder / "pretrain.json")
    linear = read_json(run.folder / "linear" / "all" / "linear.json")
    return {
        "online": training["metrics"].get("val_acc1"),
        "linear": linear["acc1"],
        "linear_top5": linear["acc5"],
        "linear_best": linear["best_acc1"],
        "epochs": training["epochs"],
        **solo.training_entries(training),
    }


def _vissl_run(method: str, dataset: str, epochs: int | None, seed: int, request: Request) -> Run:
    name = label(method, dataset, epochs)
    folder, data = request.out / "matrix_ssl" / "vissl" / name / f"seed{seed}", request.data_folder / dataset
    common = {"SEED_VALUE": seed, "DATA.TRAIN.DATA_PATHS": [data / "train"]}
    pretrain: dict[str, Any] = {**common, "CHECKPOINT.DIR": folder / "pretrain"}
    if request.devices is not None:
        pretrain["DISTRIBUTED.NUM_PROC_PER_NODE"] = request.devices
    trunk: tuple[str, ...] = ()
    if dataset == "digits":
        config, where = "digits", "digits"
        pretrain["MODEL.TRUNK.RESNETS.DEPTH"] = 50
        trunk = (f"config.MODEL.HEAD.PARAMS=[[method_head,{{in_dim:{_RESNET50}}}]]",)
    else:
        config, where = "imagenet_rn50", "imagenet1k"
        if epochs in EPOCHS[1:]:
            config += f"_e{epochs}"
    if request.epochs is not None:
        pretrain["OPTIMIZER.num_epochs"] = request.epochs
    checkpoint = folder / "pretrain" / "checkpoint.torch"  # VISSL updates this link to the latest one
    linear = {
        **common,
        "DATA.TEST.DATA_PATHS": [data / "val"],
        "MODEL.WEIGHTS_INIT.PARAMS_FILE": checkpoint,
        "CHECKPOINT.DIR": folder / "linear",
    }
    evaluation = f"benchmark/linear_image_classification/{where}/eval_resnet50_normalized_linear"
    return Run(
        framework="vissl",
        method=method,
        dataset=dataset,
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", (*vissl.command(f"pretrain/{method}/{config}", pretrain), *trunk)),
            Step("linear", vissl.command(evaluation, linear)),
            _export(checkpoint, folder),
        ),
        collect=collect_vissl,
        epochs=epochs,
        label=name,
        progress=vissl.progress,
        gpus=solo.gpu_count(dataset, request),
    )


def collect_vissl(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from summary.json and the metrics.json of the linear evaluation.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        The entries of :func:`collect_solo`, without the online classifier.
    """
    training = read_json(run.folder / "pretrain" / "summary.json")
    found = vissl.evaluations(run.folder / "linear")
    top1 = [next(iter(each["top_1"].values())) for each in found]
    return {
        "linear": top1[-1],
        "linear_top5": next(iter(found[-1]["top_5"].values())),
        "linear_best": max(top1),
        **{key: training[key] for key in ("epochs", "seconds", "images_per_second", "versions", "config")},
    }
