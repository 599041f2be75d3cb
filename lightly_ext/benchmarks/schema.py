"""The schema of ``python -m lightly_ext.benchmarks``: meaning, type, range and default of every option.

The schema defines the command line, its checks and docs/lightly_options.md, which ``python -m
lightly_ext.benchmarks.schema`` prints. :mod:`lightly_ext.benchmarks.checks` checks what depends on files and on other
packages; each method checks its own options. This module imports neither torch nor lightly.
"""

import argparse
import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, ValidationError, model_validator

from plugins.tools.backbones import BACKBONES
from plugins.tools.command import Parser, UserError, home
from plugins.tools.schema import (
    Allowed,
    Boolean,
    Fraction,
    NonNegative,
    Section,
    String,
    allowed_values,
    entry,
    integer,
    join_messages,
    real_number,
    rows,
    table,
    triple,
)


def _pairs(given: Any) -> Any:
    """Convert a list of ``key=value`` to a dictionary; a value that is not a Python literal is a string."""
    if not isinstance(given, list):
        return given
    pairs = {}
    for argument in given:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ValueError(f" must be KEY=VALUE, got {argument!r}")
        try:
            pairs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            pairs[key] = {"true": True, "false": False}.get(text.lower(), text)
    return pairs


_Folder = Annotated[Path, AfterValidator(home), Allowed("a folder")]
_File = Annotated[Path, AfterValidator(home), Allowed("a file")]
_Names = Annotated[list[String], Allowed("names of methods")]
_Pairs = Annotated[dict[str, Any], BeforeValidator(_pairs), Allowed("KEY=VALUE ...")]
_Above0 = real_number("a number above 0", gt=0)


class Options(Section):
    """The options of the command line."""

    methods: _Names | None = entry("methods to train; default: all of ours", None)
    add: _File | None = entry("Python file with a METHODS dictionary of further methods", None)
    train_dir: _Folder = entry("folder of training images, one subfolder for each class")
    val_dir: _Folder = entry("folder of validation images, of the same classes")
    log_dir: _Folder = entry("folder of the results", Path("benchmark_logs"))
    epochs: integer(0) = entry("epochs of pre-training; 0 evaluates an untrained backbone", 100)
    batch_size_per_device: integer(2) = entry("batch size on each device", 128)
    num_workers: integer(0) = entry("worker processes of the data loader; 0: the training process reads the images", 8)
    skip_bad_images: Boolean = entry(
        "whether to go on if an image cannot be decoded: training takes the next image, validation leaves it out", False
    )
    accelerator: String = entry("auto, cpu, gpu, or another accelerator of Lightning", "auto")
    devices: integer(1) = entry("number of devices", 1)
    precision: String = entry("floating-point precision, such as 16-mixed or bf16-mixed", "32-true")
    strategy: String | None = entry(
        "strategy of the Trainer; default: auto, or ddp_find_unused_parameters_true with several devices", None
    )
    ckpt_path: _File | None = entry("checkpoint to resume from; --methods must name one method", None)
    seed: integer(0, 2**32 - 1) | None = entry("seed of all random numbers; default: none", None)
    backbone: String = entry(f"a model of torchvision, {', '.join(BACKBONES)}; for our methods", "resnet50")
    backbone_option: _Pairs = entry("options of the backbone, such as zero_init_residual=True", {})
    weights: _File | None = entry(
        "initial weights of the backbone: a checkpoint or an export of any of the frameworks, or a file of VICReg's "
        "scripts; with --epochs 0 they are evaluated",
        None,
    )
    small_images: Boolean = entry(
        "ResNet with a 3x3 stem of stride 1 and without max-pool; RegNet with a stem of stride 1", False
    )
    input_size: integer(1) = entry("side of the images in pixels", 224)
    optimizer: Literal["lars", "sgd", "adamw"] = entry(
        "optimiser, for our methods; for small data sets: adamw with --lr 0.008, or sgd with --lr 0.24", "lars"
    )
    lr: NonNegative = entry("learning rate for 256 images over all devices, for our methods", 0.45)
    weight_decay: NonNegative = entry("weight decay, for our methods", 1e-6)
    decay_all: Boolean = entry("weight decay also for biases and normalisation layers, for our methods", False)
    warmup_epochs: NonNegative | None = entry(
        "epochs of linear warm-up, for our methods; default: 10, but at most a tenth of the run", None
    )
    option: _Pairs = entry("options of our methods, such as rho=0.99", {})
    transform: _Pairs = entry("arguments of our transforms, such as min_scale=0.6", {})
    mean: triple("one for each channel") | None = entry("mean of each channel; default: that of ImageNet", None)
    std: triple("above 0", gt=0) | None = entry("standard deviation of each channel; default: that of ImageNet", None)
    knn_k: integer(1) = entry("number of neighbours of the kNN evaluation", 200)
    knn_t: _Above0 = entry("temperature of the kNN evaluation", 0.1)
    linear_epochs: integer(1) = entry("epochs of the linear evaluation", 90)
    linear_lr: _Above0 = entry("learning rate of the linear evaluation for 256 images over all devices", 0.1)
    finetune_epochs: integer(1) = entry("epochs of fine-tuning", 30)
    finetune_lr: _Above0 = entry("learning rate of fine-tuning for 256 images over all devices", 0.05)
    eval_min_scale: real_number("in [1e-06, 1]", ge=1e-6, le=1) = entry(
        "smallest crop of the training images of a classifier, as a fraction of the image's area", 0.08
    )
    eval_hf_prob: Fraction = entry("probability of a horizontal flip of the training images of a classifier", 0.5)
    skip_knn_eval: Boolean = entry("skip the kNN evaluation", False)
    skip_linear_eval: Boolean = entry("skip the linear evaluation", False)
    skip_finetune_eval: Boolean = entry("skip fine-tuning", False)

    @model_validator(mode="after")
    def _complete(self) -> "Options":
        if (self.mean is None) != (self.std is None):
            raise ValueError("--mean and --std must be given together")
        if self.strategy is None:
            self.strategy = "auto" if self.devices == 1 else "ddp_find_unused_parameters_true"
        return self


def flag(name: str) -> str:
    """Return the flag of an option.

    >>> flag("train_dir")
    '--train-dir'
    """
    return "--" + name.replace("_", "-")


def parser(prog: str | None = None, description: str = "") -> Parser:
    """Return the parser of the command line; it does not check the values.

    Args:
        prog: name of the command.
        description: text above the list of options.
    """
    result = Parser(
        prog,
        usage="%(prog)s --train-dir PATH --val-dir PATH [options]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    for name, field in Options.model_fields.items():
        text, (kind, is_list) = (field.description or "").replace("%", "%%"), _kind(field.annotation)
        if kind is bool:
            result.add_argument(flag(name), action="store_true", help=text)
            continue
        if not field.is_required() and field.default not in (None, {}):
            text += f" (default: {field.default})"
        metavar = {int: "N", float: "X", dict: "KEY=VALUE", Path: "PATH"}.get(kind, "NAME")
        if get_origin(field.annotation) is Literal:
            metavar = f"{{{','.join(get_args(field.annotation))}}}"
        nargs = "+" if is_list else None
        result.add_argument(flag(name), type=_reader(kind), nargs=nargs, metavar=metavar, help=text)
    return result


def _kind(annotation: Any) -> tuple[type, bool]:
    """Return the class of the values in an annotation, and whether there are several values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return str, False
    if origin is dict:
        return dict, True
    if origin is list:
        return _kind(parts[0])[0], True
    return _kind(parts[0]) if parts else (annotation, False)


def _reader(kind: type) -> Any:
    """Return a type for argparse that does not reject text that is not a number: the schema's message is better."""

    def read(text: str) -> Any:
        try:
            return kind(text) if kind in (int, float, Path) else text
        except ValueError:
            return text

    return read


def validate(given: Mapping[str, Any]) -> Options:
    """Validate options and fill in the defaults.

    Args:
        given: the values by the names of the options.

    Raises:
        UserError: the message lists all errors, one per line.
    """
    try:
        return Options.model_validate(given)
    except ValidationError as error:
        raise UserError(join_messages([_message(given, one) for one in error.errors(include_url=False)])) from None


def _message(given: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    """Convert an error of pydantic to a message that states what was given and what is allowed."""
    name = str(error["loc"][0]) if error["loc"] else ""
    if error["type"] == "value_error":
        return (flag(name) if name else "") + str(error["ctx"]["error"])
    field = Options.model_fields[name]
    if error["type"] == "missing":
        return f"{flag(name)} is required: {field.description}"
    return f"{flag(name)} must be {allowed_values(field)}, got {given[name]!r}"


def markdown() -> str:
    """Return the text of docs/lightly_options.md."""
    found = [row._replace(path=flag(row.path), default=_shown(row.default)) for row in rows(Options)]
    lines = [
        "# Options of the lightly command",
        "",
        "Generated by `python -m lightly_ext.benchmarks.schema > docs/lightly_options.md`; edit",
        "lightly_ext/benchmarks/schema.py, not this file.",
        "",
        "These are the options of `python -m lightly_ext.benchmarks`. In the column of defaults, - means that the",
        "option is optional. An option with the values true or false is a flag without a value.",
        "",
        *table(("option", "values", "default", "meaning"), found),
    ]
    return "\n".join(lines) + "\n"


def _shown(default: str) -> str:
    return {"null": "-", "{}": "-"}.get(default, default)


if __name__ == "__main__":
    print(markdown(), end="")
