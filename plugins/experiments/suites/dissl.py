"""The TinyImageNet suites of DISSL and CISSL (Dubois et al. 2022, arXiv:2209.06235), with a trial on the digits.

A run consists of a pre-training and of probes of the frozen backbone. The settings are in the YAML files. The values
that the published scripts sweep (strength of the augmentations, width of the representation, number of clusters, number
of epochs) are overrides in this module.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from plugins.experiments.suites import Request, Run, Step
from plugins.experiments.suites.solo import (
    DATA,
    command,
    config_folder,
    gpu_count,
    pretraining,
    progress,
    requested_epochs,
    training_entries,
)
from plugins.tools.records import read_json


class Sweep(NamedTuple):
    """The values that the suites sweep on a data set.

    Args:
        configs: folder of its YAML files in configs/solo.
        long: number of epochs of the longer runs.
        wide: width of the wider representations.
        clusters: number of clusters C for augmentations of strength 1/4, 1/2 and 1.
        strengths: further overrides of all runs of figure 7a.
    """

    configs: str
    long: int
    wide: int
    clusters: tuple[int, int, int]
    strengths: tuple[str, ...] = ()


SWEEPS = {
    "tinyimagenet": Sweep(
        "tinyimagenet",
        long=1000,
        wide=2048,
        clusters=(24000, 20000, 16384),
        strengths=("++optimizer.batch_size=512", "++optimizer.classifier_lr=0.00015"),
    ),
    "digits": Sweep("digits/short", long=8, wide=2048, clusters=(384, 320, 256)),
}
DIMS = (128, 512, 2048, 8192)
"""Widths of the representation in figure 7c."""
STRENGTHS = {"quarter": 0.25, "half": 0.5, "one": 1.0}
"""Augmentations of figure 7a: name of the YAML file → strength."""


DINO_WARMUP = 50
"""Warm-up epochs of DINO's teacher temperature; reduced for shorter trainings, since it must not exceed them."""


class Variant(NamedTuple):
    """A row of a table, or a curve or a point of a figure.

    Args:
        name: first part of the run's name.
        title: name in the publication.
        config: name of the YAML file.
        overrides: Hydra overrides of the YAML file.
        long: whether it trains for ``Sweep.long`` epochs.
        probe: name of the YAML file of its probes.
    """

    name: str
    title: str
    config: str
    overrides: tuple[str, ...] = ()
    long: bool = False
    probe: str = "probe"


def _table(baseline: Variant, ours: str, title: str, sweep: Sweep) -> list[Variant]:
    """Return a baseline, a method, and the method with one, two and three cumulative changes."""
    wide = (f"++backbone.kwargs.dim={sweep.wide}",)
    return [
        baseline,
        Variant(ours, title, ours),
        Variant(f"{ours}-dim", "+ dim", ours, wide),
        Variant(f"{ours}-epochs", "+ epochs", ours, wide, long=True),
        Variant(f"{ours}-aug", "+ aug", ours, (*wide, "strength=coarse"), long=True),
    ]


def _contrastive(sweep: Sweep) -> list[Variant]:
    return _table(Variant("simclr", "SimCLR", "simclr"), "cissl", "CISSL", sweep)


def _distillation(sweep: Sweep) -> list[Variant]:
    return _table(Variant("dino", "DINO", "dino"), "dissl", "DISSL", sweep)


def _augmentations(sweep: Sweep) -> list[Variant]:
    return [
        Variant(
            f"dissl-{name}",
            f"strength {strength:g}",
            "dissl",
            (f"strength={name}", f"++method_kwargs.n_classes={clusters}", *sweep.strengths),
            probe="probe_subsets",
        )
        for (name, strength), clusters in zip(STRENGTHS.items(), sweep.clusters, strict=True)
    ]


def _dimensions(sweep: Sweep) -> list[Variant]:
    kinds = {"cissl": ("Linear", "probe"), "cissl_mlp": ("MLP", "probe_mlp")}
    return [
        Variant(
            f"{heads}-z{dim}",
            title,
            "cissl",
            (f"++backbone.kwargs.dim={dim}", f"++method_kwargs.heads={heads}"),
            long=True,
            probe=probe,
        )
        for heads, (title, probe) in kinds.items()
        for dim in DIMS
    ]


VARIANTS: dict[str, Callable[[Sweep], list[Variant]]] = {
    "dissl_table1_contrastive": _contrastive,
    "dissl_table1_distillation": _distillation,
    "dissl_fig7a": _augmentations,
    "dissl_fig7c": _dimensions,
}
"""Suite → function that returns its runs on a data set."""
TITLES = {
    "dissl_table1_contrastive": "arXiv:2209.06235, table 1, contrastive: SimCLR, CISSL and the effect of each change",
    "dissl_table1_distillation": "arXiv:2209.06235, table 1, distillation: DINO, DISSL and the effect of each change",
    "dissl_fig7a": "arXiv:2209.06235, figure 7a: DISSL, three augmentation strengths, probes with fewer labels",
    "dissl_fig7c": "arXiv:2209.06235, figure 7c: CISSL by representation width, linear and MLP heads and probes",
}


def run_lister(suite: str) -> Callable[[Request], list[Run]]:
    """Return the function that lists the runs of a suite."""

    def runs(request: Request) -> list[Run]:
        return [
            _run(suite, variant, dataset, seed, request)
            for seed in request.seeds
            for dataset in request.data or ("tinyimagenet",)
            for variant in VARIANTS[suite](SWEEPS[dataset])
        ]

    return runs


def _run(suite: str, variant: Variant, dataset: str, seed: int, request: Request) -> Run:
    base, label, data = request.out / suite / "solo", f"{variant.name}_{dataset}", DATA[dataset]
    sweep, folder = SWEEPS[dataset], base / label / f"seed{seed}"
    configs = config_folder(sweep.configs)
    train, val = request.data_folder / data.train, request.data_folder / data.val
    overrides = pretraining(base, label, seed, {"data.train_path": train, "data.val_path": val}, request)
    if request.epochs is not None:
        overrides.update(requested_epochs(request.epochs))
        if variant.config == "dino" and request.epochs < DINO_WARMUP:
            overrides["method_kwargs.warmup_teacher_temperature_epochs"] = request.epochs
    elif variant.long:
        overrides["max_epochs"] = sweep.long
    options = {
        "config": configs / f"{variant.probe}.yaml",
        "pretrained_checkpoint_dir": folder,
        "dataset": dataset,
        "train_data_path": train,
        "val_data_path": val,
        "num_workers": data.workers,
        "seed": seed,
        "output": folder / "probe.json",
    }
    flags = (text for key, value in options.items() for text in (f"--{key}", str(value)))
    return Run(
        framework="solo",
        method=variant.name,
        dataset=dataset,
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", command("main_pretrain", configs, variant.config, overrides, variant.overrides)),
            Step("probe", ("-m", "solo_ext.main_probe", *flags)),
        ),
        collect=collect,
        epochs=request.epochs,
        progress=progress,
        label=label,
        gpus=gpu_count(dataset, request),
    )


def collect(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from pretrain.json and probe.json.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run; ``linear`` is the accuracy of the first linear probe.
    """
    training, probes = read_json(run.folder / "pretrain.json"), read_json(run.folder / "probe.json")
    linear: Sequence[float] = [probe["acc1"] for probe in probes if probe["kind"] == "linear"]
    return {
        "epochs": training["epochs"],
        "online": training["metrics"]["val_acc1"],
        "linear": linear[0] if linear else None,
        "probes": probes,
        **training_entries(training),
    }
