"""Training step of each method, compared with solo-learn's methods: ``python -m plugins.experiments.bench step``.

A step includes everything that Lightning does for one batch: the forward passes of student and teacher, loss, backward,
optimiser step, update of the teacher, and logging. A method and its reference have the same configuration (its YAML
file), backbone, head widths, optimiser and batch. They run alternately in one process, a few steps per round. The table
has the median times over rounds, the median and range of the ratio, and the ratio of the fastest steps. A ratio below 1
means that the step is faster than that of the reference.

The reference is solo-learn's method of the same name; if there is none, it is BYOL for methods with a teacher and
VICReg for the others. Methods with a teacher are also measured with momentum τ = 0, where no teacher is needed.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterable
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from plugins.tools.command import UserError, exit_on_user_error, integer_from

PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
"""Clocks. Processor time excludes other programs; it is for single-threaded measurements on a shared machine."""
WARM_UP = 1
"""Untimed steps at the start of each turn, in which the optimiser allocates its state."""
_WIDTHS = {"proj_hidden_dim", "proj_output_dim"}
"""Options of methods with a projector of the same form as in solo-learn."""
_NATIVE = {"moco": "mocov2plus"}
"""Methods that solo-learn has under another name. Its MoCo v2+ has two queries of each image, ours has one."""
_RENAMED = {"bottleneck_dim": "proj_output_dim", "proj_norm": "use_bn_in_head"}
"""Options of our DINO with another name in solo-learn."""
_VICREG = {"sim_loss_weight": 25.0, "var_loss_weight": 25.0, "cov_loss_weight": 1.0}


class Setting(NamedTuple):
    """The settings that all methods of a comparison share."""

    configs: str = "configs/solo/digits"
    """Folder with one YAML file per method."""
    backbone: str | None = None
    """Value of ``backbone.name``; None uses the value of the YAML file."""
    size: int = 32
    """Height and width of the images, in pixels."""
    batch: int = 64
    """Batch size; a step processes two views of each image."""
    hidden: int | None = None
    """Width of the hidden layers of projector and predictor; None uses the value of the YAML file."""
    width: int | None = None
    """Width of the embedding; None uses the value of the YAML file."""
    device: str = "cpu"
    precision: str = "32"
    clock: str = "wall"
    overrides: tuple[str, ...] = ()
    """Hydra overrides for all methods, such as ``optimizer.name=lars``."""


class StepResult(NamedTuple):
    """One row of the table."""

    method: str
    teacher: str
    """"EMA", "τ = 0" or "none"."""
    reference: str
    hidden: int
    width: int
    seconds: float
    reference_seconds: float
    ratio: float
    """Median over rounds of the ratio of the step times, method / reference."""
    fastest: float
    """Ratio of the fastest steps; the least affected by other programs on the machine."""
    ratios: list[float]
    """Ratio of the median step times in each round."""


class Contestant:
    """A method, and a batch to run it with in Lightning's trainer.

    Args:
        model: the method.
        setting: batch size, device and precision.
    """

    def __init__(self, model: Any, setting: Setting) -> None:
        self.model, self.setting = model, setting
        generator = torch.Generator().manual_seed(0)
        rows, size = setting.batch, setting.size
        views = [torch.randn(rows, 3, size, size, generator=generator).to(setting.device) for _ in range(2)]
        index = torch.arange(rows, device=setting.device)
        self.batch = (index, views, index % model.num_classes)

    def turn(self, steps: int) -> list[float]:
        """Run a number of steps after the untimed ones, and return their times in seconds."""
        from omegaconf import OmegaConf
        from torch.utils.data import DataLoader

        from solo_ext.compat import pl
        from solo_ext.launch import build_trainer

        begins: list[float] = []
        setting = self.setting
        callback: Any = pl.Callback

        class Clock(callback):
            def on_train_batch_start(self, *_: Any) -> None:
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                begins.append(CLOCKS[setting.clock]())

        options = {
            "accelerator": "gpu" if setting.device == "cuda" else "cpu",
            "devices": 1,
            "strategy": "auto",
            "precision": PRECISIONS[setting.precision],
            "max_epochs": 1,
            "enable_progress_bar": False,
        }
        trainer = build_trainer(OmegaConf.create(options), [], [Clock()])
        # the start of an additional batch marks the end of the last step
        batches: Any = [self.batch] * (WARM_UP + steps + 1)
        trainer.fit(self.model, DataLoader(batches, batch_size=None))
        self.model.zero_grad(set_to_none=True)
        return [end - begin for begin, end in pairwise(begins)][WARM_UP:]


def bench_step(
    setting: Setting, *, methods: str = "*", repeat: int = 5, steps: int = 3
) -> tuple[list[StepResult], list[str]]:
    """Compare the methods whose name matches a pattern with their references.

    Args:
        setting: shapes, device and options.
        methods: pattern of method names with the wildcards ``*`` and ``?``, such as ``iso*``.
        repeat: number of rounds, >= 1.
        steps: number of timed steps of each method per round, >= 1.

    Returns:
        A row per method and teacher, and the names of skipped methods: those without a file in the folder, those with
        stacks of patches or a memory of images, and those whose projector has another form than in solo-learn.

    Raises:
        UserError: the folder, method, backbone or option does not exist.
    """
    from plugins.methods import METHODS
    from solo_ext.compat import native_methods
    from solo_ext.launch import config_folder
    from solo_ext.registry import plugin_methods

    folder = config_folder(setting.configs)
    names = [name for name in METHODS if fnmatch(name, methods)]
    if not names:
        raise UserError(f"no method matches {methods!r}; the methods are {', '.join(METHODS)}")
    left_out = [
        name
        for name in names
        if not (folder / f"{name}.yaml").is_file()
        or METHODS[name].stacks
        or METHODS[name].indexed
        or not {_RENAMED.get(option, option) for option in METHODS[name].options} >= _WIDTHS
    ]
    contestants: dict[tuple, Contestant] = {}
    pairs = []
    for name in names:
        if name in left_out:
            continue
        cfg = _configuration(folder, name, setting)
        reference = _reference(cfg)
        widths = (reference.method_kwargs.proj_hidden_dim, reference.method_kwargs.proj_output_dim)
        against = (reference.method, *widths)
        if against not in contestants:
            contestants[against] = _contestant(native_methods()[reference.method], reference, setting)
        for teacher in ("EMA", "τ = 0") if METHODS[name].teacher else ("none",):
            if teacher == "τ = 0":
                cfg.momentum.base_tau = cfg.momentum.final_tau = 0.0
            contestants[name, teacher] = _contestant(plugin_methods()[name], cfg, setting)
            pairs.append(((name, teacher), against))

    rounds: dict[tuple, list[list[float]]] = {key: [] for key in contestants}
    for number in range(repeat):
        # reverse the order in every second round, so that no method always runs after the same one
        order = list(contestants) if number % 2 == 0 else list(contestants)[::-1]
        for key in order:
            rounds[key].append(contestants[key].turn(steps))
    results: list[StepResult] = []
    for key, against in pairs:
        medians = [[statistics.median(times) for times in rounds[each]] for each in (key, against)]
        ratios = [a / b for a, b in zip(*medians, strict=True)]
        ours, theirs = (statistics.median(times) for times in medians)
        fastest = min(map(min, rounds[key])) / min(map(min, rounds[against]))
        method, teacher = key
        reference, hidden, width = against
        row = StepResult(
            method, teacher, reference, hidden, width, ours, theirs, statistics.median(ratios), fastest, ratios
        )
        results.append(row)
    return results, left_out


def _configuration(folder: Path, name: str, setting: Setting) -> Any:
    """Compose the YAML file of a method and apply the setting."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from solo_ext.compat.common import fill_defaults

    with initialize_config_dir(str(folder), version_base="1.2"):
        try:
            cfg = compose(name, list(setting.overrides))
            OmegaConf.resolve(cfg)
        except Exception as error:  # Hydra raises many kinds; the first line of each is enough
            raise UserError(f"{folder / name}.yaml: {str(error).splitlines()[0]}") from None
    OmegaConf.set_struct(cfg, False)
    kwargs = cfg.setdefault("method_kwargs", {})
    if setting.backbone is not None:
        cfg.backbone.name = setting.backbone
    if setting.hidden is not None:
        kwargs.proj_hidden_dim = setting.hidden
        if "pred_hidden_dim" in kwargs:
            kwargs.pred_hidden_dim = setting.hidden
    if setting.width is not None:
        kwargs["bottleneck_dim" if "bottleneck_dim" in kwargs else "proj_output_dim"] = setting.width
    cfg.augmentations[0].crop_size = setting.size
    cfg.optimizer.batch_size = setting.batch
    cfg.max_epochs = 1
    cfg.data.update({"num_classes": 10, "num_large_crops": 2, "num_small_crops": 0})
    return fill_defaults(cfg)


def _reference(cfg: Any) -> Any:
    """Return the same configuration for solo-learn's method; its predictor is as wide as ours, or as the projector."""
    from plugins.methods import METHODS
    from solo_ext.compat import native_methods, native_options

    ours, name = METHODS[cfg.method], _NATIVE.get(cfg.method, cfg.method)
    if name not in native_methods():
        name = "byol" if ours.teacher else "vicreg"
    known = native_options(name)
    resolved = {_RENAMED.get(key, key): value for key, value in ours.resolve(dict(cfg.method_kwargs)).items()}
    aliases = {alias: resolved[key] for key, option in ours.options.items() for alias in option.aliases}
    given = {**_VICREG, **aliases, **resolved, "clip_grad": 0, "norm_last_layer": True}
    if name in ("byol", "simsiam"):
        given["pred_hidden_dim"] = given.get("pred_hidden_dim", given["proj_hidden_dim"])
    reference = cfg.copy()
    reference.method = name
    reference.method_kwargs = {key: value for key, value in given.items() if key in known}
    return reference


def _contestant(cls: type, cfg: Any, setting: Setting) -> Contestant:
    from solo_ext.launch import as_user_error

    with as_user_error(f"method {cfg.method}"):
        model = cls(cfg)
    if not cfg.performance.disable_channel_last:
        model = model.to(memory_format=torch.channels_last)
    return Contestant(model, setting)


def table(results: Iterable[StepResult]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| method | teacher | solo-learn's | hidden, width | ms a step | solo-learn's ms | ratio | rounds | fastest |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        lines.append(
            f"| {r.method} | {r.teacher} | {r.reference} | {r.hidden}, {r.width} | {1e3 * r.seconds:.1f} "
            f"| {1e3 * r.reference_seconds:.1f} | {r.ratio:.2f} | {min(r.ratios):.2f}–{max(r.ratios):.2f} "
            f"| {r.fastest:.2f} |"
        )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench step``."""
    default = Setting()
    add = parser.add_argument
    add("--method", default="*", metavar="PATTERN", help="methods whose name matches, such as 'iso*'")
    add("--configs", default=default.configs, metavar="FOLDER", help="folder of YAML files (default: %(default)s)")
    add("--backbone", metavar="NAME", help="backbone.name (default: as in the YAML file)")
    add(
        "--size",
        type=integer_from(1),
        default=default.size,
        help="height and width of the images (default: %(default)s)",
    )
    add(
        "--batch", type=integer_from(2), default=default.batch, help="batch size, two views each (default: %(default)s)"
    )
    add("--hidden", type=integer_from(1), help="hidden width of projector and predictor (default: as in the YAML file)")
    add("--width", type=integer_from(1), help="width of the embedding (default: as in the YAML file)")
    add("--device", choices=("cpu", "cuda"), default=default.device)
    add("--precision", choices=tuple(PRECISIONS), default=default.precision, help="16 and bf16 are mixed precision")
    add(
        "--clock",
        choices=tuple(CLOCKS),
        default=default.clock,
        help="processor: excludes other programs; for one thread",
    )
    add("--repeat", type=integer_from(1), default=5, help="number of rounds (default: %(default)s)")
    add("--steps", type=integer_from(1), default=3, help="timed steps per method and round (default: %(default)s)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides of all methods, as data.dataset=cifar10")


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the benchmark and print the table.

    Returns:
        The environment and the results.

    Raises:
        SystemExit: with status 2, after a one-line error, if an option is invalid.
    """
    from solo_ext.launch import hide_warnings

    hide_warnings()
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")
    from solo_ext.compat import host_release

    setting = Setting(**{key: getattr(options, key) for key in Setting._fields if key != "overrides"})
    setting = setting._replace(overrides=tuple(options.overrides))
    device = torch.cuda.get_device_name() if setting.device == "cuda" else f"CPU threads: {torch.get_num_threads()}"
    print(
        f"solo-learn {host_release()}, torch {torch.__version__}, {device}, precision {setting.precision}; "
        f"{setting.batch} images of {setting.size} px; {setting.clock} time, medians of {options.repeat} rounds",
        flush=True,
    )
    with exit_on_user_error():
        results, left_out = bench_step(setting, methods=options.method, repeat=options.repeat, steps=options.steps)
    print(table(results))
    if left_out:
        kinds = f"stacks of patches, a memory of images, no file in {setting.configs}"
        reasons = f"{kinds}, or a head unlike solo-learn's projector"
        print(f"skipped ({reasons}): {', '.join(left_out)}")
    environment = {"solo-learn": host_release(), "torch": torch.__version__, "device": device, **setting._asdict()}
    return environment, [result._asdict() for result in results]
