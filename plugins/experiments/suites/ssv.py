"""The suite ``self_supervised_vision``: the twelve methods of that repository's table on six networks.

A run trains a method with its YAML file in configs/ssv, by the repository's own command, and evaluates the network
after the last epoch. On the digits, with the files in configs/ssv/digits, a run is a trial of minutes.
"""

from pathlib import Path
from typing import Any

from plugins.experiments.suites import Request, Run, Step, solo
from plugins.tools.records import read_json

ALGORITHMS = ("byol", "relic", "simclr", "swav", "moco", "barlow", "pirl", "amdim", "cpc", "seer", "sela", "dino")
ARCHS = ("resnet18", "resnet50", "resnext50", "resnext101", "wide_resnet50", "wide_resnet101")
DATA = ("cifar10", "cifar100", "digits")
CONFIGS = Path("configs/ssv")
"""Folder of the YAML files; the command finds those that are installed with solo_ext, too."""
WARMUP = 10
"""Longest warm-up of the YAML files, in epochs. A run of fewer epochs has none, since a warm-up must end before it."""
SEED = 420
"""The original's seed, that of the first run of a method."""


def runs(request: Request) -> list[Run]:
    """List the runs of twelve methods on six networks.

    Args:
        request: folder, seeds, epochs, devices and data.
    """
    return [
        _run(algo, arch, dataset, SEED + number, request)
        for number in request.seeds
        for dataset in request.data or DATA[:1]
        for algo in ALGORITHMS
        for arch in ARCHS
    ]


def label(algo: str, arch: str, dataset: str) -> str:
    """Return the name of a run within the suite.

    >>> label("byol", "resnet18", "cifar10"), label("byol", "resnet18", "digits")
    ('byol-resnet18', 'byol-resnet18_digits')
    """
    return f"{algo}-{arch}" + ("" if dataset == "cifar10" else f"_{dataset}")


def _run(algo: str, arch: str, dataset: str, seed: int, request: Request) -> Run:
    name = label(algo, arch, dataset)
    folder = request.out / "self_supervised_vision" / "solo" / name / f"seed{seed}"
    data = solo.DATA[dataset]
    root = request.data_folder / (dataset if dataset == "digits" else data.train)
    entries: dict[str, Any] = {"seed": seed, "data.dataset_name": dataset, "data.root": root}
    if request.epochs is not None:
        entries["epochs"] = request.epochs
        if request.epochs <= WARMUP:
            entries["scheduler.warmup_epochs"] = 0
    options = {
        "config": CONFIGS / ("digits" if dataset == "digits" else "") / f"{algo}.yaml",
        "algo": algo,
        "arch": arch,
        "task": "train",
        "output": folder.resolve(),  # a path relative to outputs/<algo>/<arch>, unless it is absolute
        **({} if request.devices is None else {"devices": request.devices}),
    }
    flags = (text for key, value in options.items() for text in (f"--{key}", str(value)))
    return Run(
        framework="solo",
        method=algo,
        dataset=dataset,
        seed=seed,
        folder=folder,
        steps=(Step("train", ("-m", "solo_ext.ssv", *flags, *(f"{key}={value}" for key, value in entries.items()))),),
        collect=collect,
        epochs=request.epochs,
        label=name,
        progress=solo.progress,
        gpus=solo.gpu_count(dataset, request),
    )


def collect(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from pretrain.json and linear_eval.json.

    Args:
        run: a run whose command has succeeded.

    Returns:
        Entries of result.json, without the identity of the run. Accuracies are in per cent and those of the last epoch:
        ``neighbors`` and ``neighbors_head``, ``knn`` and ``knn_head``, ``linear`` and ``linear_head``; without
        ``_head``, they are those of the features of the trunk.
    """
    training, found = read_json(run.folder / "pretrain.json"), read_json(run.folder / "linear_eval.json")
    scores = {}
    for kind in ("neighbors", "knn", "linear"):
        scores |= {kind: found[kind]["trunk"], f"{kind}_head": found[kind]["head"]}
    return {
        "epochs": training["epochs"],
        **scores,
        **solo.training_entries(training),
    }
