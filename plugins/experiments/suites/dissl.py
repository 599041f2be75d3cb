"""The TinyImageNet suites of DISSL and CISSL (Dubois et al. 2022, arXiv:2209.06235), which can be tried on the digits.

A run is a pre-training and probes of its frozen backbone. Its YAML has the settings; what the published scripts sweep
(strength of the views, width of the representation, number of clusters, length) stands here, as overrides.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from plugins.experiments.suites import Request, Run, Step
from plugins.experiments.suites.solo import (
    DATA,
    command,
    config_folder,
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
        long: epochs of the longer runs.
        wide: width of the wider representations.
        clusters: C at views of strength 1/4, 1/2 and 1.
        strengths: what all runs of figure 7a change besides.
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
"""Views of figure 7a: name of their YAML → strength."""


DINO_WARMUP = 50
"""Epochs of its teacher's temperature, which cannot be more than those of the training."""


class Variant(NamedTuple):
    """A line of a table, or of a figure a curve or a point.

    Args:
        name: first part of the run's name.
        title: as its authors call it.
        config: name of the YAML file.
        overrides: what it changes there.
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
    """A baseline, a method, and that with one change more each time."""
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
"""suite → its runs on a data set."""
TITLES = {
    "dissl_table1_contrastive": "table 1 of arXiv:2209.06235, contrastive: SimCLR, CISSL, and what each change adds",
    "dissl_table1_distillation": "the same of distillation: DINO, DISSL, and what each change adds",
    "dissl_fig7a": "its figure 7a: DISSL with three strengths of views, probed with ever fewer labels",
    "dissl_fig7c": "its figure 7c: CISSL by width of the representation, with linear and with MLP heads and probes",
}


def run_lister(suite: str) -> Callable[[Request], list[Run]]:
    """The function that lists a suite's runs."""

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
    )


def collect(run: Run) -> dict[str, Any]:
    """The numbers of a run, from pretrain.json and probe.json.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run; ``linear`` is the first linear probe's accuracy.
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
