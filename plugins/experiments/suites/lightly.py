"""The lightly runs of the suite ``digits``.

lightly has no configuration files. The command-line arguments are derived from solo-learn's YAML files, so that both
frameworks train with the same settings.
"""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from plugins.experiments.suites import Progress, Request, Run, Step
from plugins.experiments.suites.solo import KNN, config_folder, methods_of, read_progress
from plugins.tools.records import read_json

CHANNELS = {"mean": (0.2692, 0.2715, 0.2712), "std": (0.1796, 0.1785, 0.1798)}
"""Mean and standard deviation of the channels of the training images."""


def digits(request: Request) -> list[Run]:
    """List a run for each method that has a YAML file for the digits in solo-learn.

    The untrained and the supervised backbone are run in solo-learn only, since network and training are the same.

    Args:
        request: folder, seeds and epochs.

    Returns:
        The runs, in the order in which they should start.
    """
    configs = config_folder("digits").resolve()
    methods = {name: _composed(configs, name) for name in methods_of(configs)}
    linear, linear_5 = _composed(configs, "linear"), _composed(configs, "linear_5")
    return [
        _run(method, seed, config, linear, linear_5, request)
        for seed in request.seeds
        for method, config in methods.items()
    ]


@cache
def _composed(folder: Path, name: str) -> Any:
    """Return a configuration of solo-learn. Do not change it."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(folder), version_base="1.2"):
        return compose(name)


def _run(method: str, seed: int, config: Any, linear: Any, linear_5: Any, request: Request) -> Run:
    """Pre-train and evaluate the frozen backbone; then run the linear evaluation with five labels per class."""
    folder = request.out / "digits" / "lightly" / method / f"seed{seed}"
    data = request.data_folder / "digits"
    view = config.augmentations[0]
    epochs = request.epochs or config.max_epochs
    common = {
        "methods": method,
        "val-dir": data / "val",
        "num-workers": config.data.num_workers,
        "accelerator": config.accelerator,
        "backbone": config.backbone.name,
        "input-size": input_size(view),
        **CHANNELS,
        "option": {**config.method_kwargs, **config.momentum},
        "seed": seed,
        "eval-min-scale": linear.data.augmentations.crop_min_scale,
        "eval-hf-prob": _probability(view, "horizontal_flip"),
        "skip-finetune-eval": True,
    }
    train = {
        "train-dir": data / "train",
        "log-dir": folder,
        "epochs": epochs,
        "batch-size-per-device": config.optimizer.batch_size,
        "optimizer": config.optimizer.name,
        "lr": config.optimizer.lr,
        "weight-decay": config.optimizer.weight_decay,
        "warmup-epochs": config.scheduler.warmup_epochs,
        "transform": {**_transform(view), **stack_arguments(config.augmentations)},
        "knn-k": KNN["k"],
        "knn-t": KNN["temperature"],
    }
    few = {
        "train-dir": data / "train_5",
        "log-dir": folder / "linear_5",
        "epochs": 0,
        "ckpt-path": folder / method / "checkpoint.ckpt",
        "batch-size-per-device": linear_5.optimizer.batch_size,
        "skip-knn-eval": True,
    }
    return Run(
        framework="lightly",
        method=method,
        dataset="digits",
        seed=seed,
        folder=folder,
        steps=(
            Step("pretrain", command({**common, **train, **_linear(linear)})),
            Step("linear_5", command({**common, **few, **_linear(linear_5)})),
        ),
        collect=collect,
        epochs=request.epochs,
        progress=partial(progress, method=method, epochs=epochs),
    )


def _transform(view: Any) -> dict[str, float]:
    """Convert an entry of ``augmentations`` to arguments of lightly's transforms."""
    jitter = view.color_jitter
    return {
        "min_scale": view.rrc.crop_min_scale,
        "cj_prob": jitter.prob,
        "cj_strength": 1.0,
        "cj_bright": jitter.brightness,
        "cj_contrast": jitter.contrast,
        "cj_sat": jitter.saturation,
        "cj_hue": jitter.hue,
        "random_gray_scale": _probability(view, "grayscale"),
        "gaussian_blur": _probability(view, "gaussian_blur"),
        "solarization_prob": _probability(view, "solarization"),
        "hf_prob": _probability(view, "horizontal_flip"),
    }


def _probability(view: Any, step: str) -> float:
    """Return the probability of a step of an entry of ``augmentations``; 0 if the entry does not have it."""
    return (view.get(step) or {}).get("prob", 0.0)


def input_size(view: Any) -> int:
    """Return the side of the images of evaluation, in pixels, of the first entry of ``augmentations``."""
    return view["crop_size"] if view.get("grid") is None else view["grid"]["side"]


def stack_arguments(augmentations: Sequence[Any]) -> dict[str, float]:
    """Return the arguments of PIRLTransform or CPCTransform for the patches of ``augmentations``, if there are any.

    The colours of the patches are those of the first entry.
    """
    stack = augmentations[-1]
    if stack.get("grid") is not None:
        return {"patch_size": stack["crop_size"], "patch_stride": stack["grid"]["stride"]}
    if stack.get("jigsaw") is None:
        return {}
    return {
        "jigsaw_size": stack["jigsaw"]["side"],
        "grid": stack["jigsaw"]["grid"],
        "patch_size": stack["crop_size"],
        "jigsaw_min_scale": stack["rrc"]["crop_min_scale"],
        "photometric_prob": _probability(stack, "photometric"),
    }


def _linear(config: Any) -> dict[str, float]:
    return {"linear-epochs": config.max_epochs, "linear-lr": config.optimizer.lr}


def command(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Compose a command of lightly_ext.

    Args:
        options: option without dashes → value. A dictionary becomes key=value arguments; True gives a flag.
    """
    words: list[str] = []
    for name, value in options.items():
        words.append(f"--{name}")
        if isinstance(value, dict):
            words += [f"{key}={entry}" for key, entry in value.items()]
        elif isinstance(value, tuple):
            words += [str(entry) for entry in value]
        elif value is not True:
            words.append(str(value))
    return ("-m", "lightly_ext.benchmarks", *words)


def progress(folder: Path, *, method: str, epochs: int) -> Progress | None:
    """Read the state of the pre-training in a run's folder; None if it is not known yet."""
    return read_progress(folder / method, lambda: epochs)


def collect(run: Run) -> dict[str, Any]:
    """Collect the numbers of a run from the two files result.json that its commands wrote.

    Args:
        run: a run whose commands have all succeeded.

    Returns:
        Entries of result.json, without the identity of the run; accuracies, in per cent, are those of the last epoch.
    """
    training, few = (read_json(folder / run.method / "result.json") for folder in (run.folder, run.folder / "linear_5"))
    return {
        "knn": 100 * training["knn"]["top1"],
        "linear": 100 * training["linear"]["top1"],
        "linear_5": 100 * few["linear"]["top1"],
        **{key: training[key] for key in ("epochs", "seconds", "images_per_second", "versions", "config")},
    }
