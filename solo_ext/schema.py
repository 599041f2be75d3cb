"""Every entry of a configuration: its meaning, kind, range and default. Made from it: the checks, and the tables of
``--help-config`` and docs/solo_options.md, which ``python -m solo_ext.schema`` writes.

The format is that of solo-learn's main branch. :func:`validate` names all mistakes at once. What depends on the
machine, on files or on other packages is checked in :mod:`solo_ext.config`, the options of a method by the method. This
module imports neither torch nor solo-learn.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from plugins.tools.command import UserError

IGNORED = {
    "augmentations_cfg": "left over in main's scripts/pretrain/imagenet-100/simsiam.yaml; no version reads it",
    "wandb_cfg": "left over in main's scripts/pretrain/imagenet-100/simsiam.yaml; no version reads it",
    "defaults": "Hydra's list of further files; gone once Hydra has composed them",
    "hydra": "Hydra's own section; gone once Hydra has composed the configuration",
}
"""Entries at the top level that are accepted and have no effect, and why."""
OURS = {
    "logger": "metrics.csv and TensorBoard are always written, wandb.enabled=true adds Weights & Biases",
    "callbacks": "a configuration cannot hold any",
    "enable_checkpointing": "use checkpoint.enabled",
    "use_distributed_sampler": "the loaders divide the images among the processes",
}
"""Arguments of Lightning's Trainer that the commands set themselves, and what to do instead."""


class Says(NamedTuple):
    """What a value may be, in words.

    Args:
        words: to be put behind "must be".
    """

    words: str


def _from_word(value: Any) -> Any:
    """YAML reads the number 1e-5 as a word."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _to_word(value: Any) -> Any:
    """YAML reads the words 3 and 2024 as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _no_slash(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        raise ValueError(f" becomes the name of a file: it cannot hold a slash, got {value!r}")
    return value


def _whole(least: int, most: int | None = None) -> Any:
    words = f"a whole number, at least {least}" if most is None else f"a whole number in [{least}, {most}]"
    return Annotated[int, Strict(), Field(ge=least, le=most), Says(words)]


def _number(says: str, **limits: float) -> Any:
    return Annotated[float, BeforeValidator(_from_word), Strict(), Field(allow_inf_nan=False, **limits), Says(says)]


def _three(least: float) -> Any:
    element = Annotated[float, Strict(), Field(allow_inf_nan=False, ge=least)]
    return Annotated[list[element], Field(min_length=3, max_length=3), Says(f"three numbers, at least {least:g}")]


_Switch = Annotated[bool, Strict(), Says("true or false")]
_Positive = _number("a number, at least 0", ge=0)
_Share = _number("in [0, 1]", ge=0, le=1)
_Word = Annotated[str, BeforeValidator(_to_word), Strict(), Field(min_length=1), Says("a word")]
_FileName = Annotated[_Word, BeforeValidator(_no_slash), Says("a word without a slash")]
_Side = _whole(1, 16384)
_SECTION = "a section with entries of its own"
_Free = Annotated[dict[str, Any], Says(_SECTION)]


class Section(BaseModel):
    """A section of a configuration; an entry that it does not know is a mistake."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def _entry(meaning: str, default: Any = ..., *, optional: bool = False) -> Any:
    """A field.

    Args:
        meaning: what it is, and in what unit.
        default: its value where it is left out; it must be given when Ellipsis.
        optional: whether it stays out of the configuration where it is left out.
    """
    return Field(None if optional else default, description=meaning, json_schema_extra={"optional": optional})


def _section(cls: type[Section], meaning: str) -> Any:
    return Field(default_factory=cls, description=meaning)


def _needs(section: Section, *names: str) -> None:
    """Refuse a section that is switched on and lacks one of these."""
    for name in names:
        if getattr(section, name) is None:
            raise ValueError(f".{name} must be {words(type(section).model_fields[name])}, got None")


class Backbone(Section):
    """The network."""

    name: _Word = _entry("network, such as resnet18 or vit_tiny; a wrong name is answered with all names")
    kwargs: _Free = _entry("arguments of the network's constructor", {})


class Data(Section):
    """The images."""

    dataset: Literal["cifar10", "cifar100", "stl10", "tinyimagenet", "imagenet100", "imagenet", "custom", "digits"] = (
        _entry("data set; custom: a folder of one's own, with a folder of images for each class")
    )
    train_path: _Word = _entry("folder of the training images; h5: the file; CIFAR and STL-10: where to download to")
    val_path: _Word | None = _entry("the same of the validation images; null: no validation", None)
    format: Literal["image_folder", "dali", "h5"] = _entry("what reads the images", "image_folder")
    num_workers: _whole(0, 1024) = _entry("processes that read images; 0: the training process itself", 4)
    no_labels: _Switch = _entry("whether custom images lie in the folder itself, without classes", False)
    fraction: _number("above 0 and at most 1, or -1 for all images", ge=-1, le=1) = _entry(
        "part of the training images to use, the same of each class; -1: all", -1
    )

    @model_validator(mode="after")
    def _check_fraction(self) -> "Data":
        if self.fraction != -1 and self.fraction <= 0:
            raise ValueError(f".fraction must be above 0 and at most 1, or -1 for all images, got {self.fraction:g}")
        return self


class LinearAugmentations(Section):
    """Crops and normalisation of a linear evaluation."""

    crop_size: _Side = _entry("side of training and validation images in pixels; the data set's own", optional=True)
    crop_min_scale: _number("in (0, 1]", gt=0, le=1) = _entry(
        "smallest crop as a part of the image's area; 0.08", optional=True
    )
    mean: _three(0) = _entry("of each channel, in [0, 1], for custom data; ImageNet's", optional=True)
    std: _three(1e-6) = _entry("of each channel, in [0, 1], for custom data; ImageNet's", optional=True)


class LinearData(Data):
    """The images of a linear evaluation."""

    val_path: _Word = _entry("the same of the validation images")
    augmentations: LinearAugmentations = _entry("crops and normalisation", optional=True)


class Dali(Section):
    """NVIDIA DALI, for ``data.format=dali``."""

    device: Literal["cpu", "gpu"] = _entry("where images are decoded; where the network trains", optional=True)
    encode_indexes_into_labels: _Switch = _entry("solo-learn's; no effect, the indexes are right without", False)


class Crop(Section):
    """A random resized crop."""

    enabled: _Switch = _entry("whether a random part is taken; else the centre of the resized image")
    crop_min_scale: _Share = _entry("smallest part of the image's area, above 0", optional=True)
    crop_max_scale: _Share = _entry("largest part of the image's area", optional=True)

    @model_validator(mode="after")
    def _check(self) -> "Crop":
        if self.enabled:
            _needs(self, "crop_min_scale", "crop_max_scale")
            if not 0 < self.crop_min_scale <= self.crop_max_scale:
                raise ValueError(".crop_min_scale must be above 0 and not above crop_max_scale")
        return self


class Step(Section):
    """A step of an augmentation, with its probability."""

    enabled: _Switch = _entry("false switches the step off, whatever prob is", optional=True)
    prob: _Share = _entry("probability")

    @model_validator(mode="after")
    def _switch(self) -> "Step":
        if self.enabled is False:
            self.prob = 0.0  # some of main's files write both; main looks at prob alone
        return self


class Jitter(Step):
    """Random changes of colour; the numbers are those of torchvision's ColorJitter, needed where prob is above 0."""

    brightness: _Positive = _entry("x of a factor in [1 - x, 1 + x]", optional=True)
    contrast: _Positive = _entry("x of a factor in [1 - x, 1 + x]", optional=True)
    saturation: _Positive = _entry("x of a factor in [1 - x, 1 + x]", optional=True)
    hue: _number("in [0, 0.5]", ge=0, le=0.5) = _entry("x of a turn in [-x, x] of the circle", optional=True)

    @model_validator(mode="after")
    def _check(self) -> "Jitter":
        if self.prob > 0:
            _needs(self, "brightness", "contrast", "saturation", "hue")
        return self


_STEPS = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization", "horizontal_flip")


def _step(cls: type[Step], meaning: str) -> Any:
    return Field(default_factory=lambda: cls(prob=0.0), description=meaning)


class View(Section):
    """Crops of an image that are made alike. A step that is left out is switched off."""

    rrc: Crop = _entry("random resized crop")
    color_jitter: Jitter = _step(Jitter, "changes of colour")
    grayscale: Step = _step(Step, "no colour")
    gaussian_blur: Step = _step(Step, "blur with a width of 0.1 to 2 pixels")
    solarization: Step = _step(Step, "values above half are inverted")
    equalization: Step = _step(Step, "equalised histogram")
    horizontal_flip: Step = _step(Step, "mirrored")
    crop_size: _Side = _entry("side in pixels; views of the first entry's size are large crops, others small ones")
    num_crops: _whole(1, 1024) = _entry("crops of each image")
    mean: _three(0) = _entry("of each channel, in [0, 1], for custom data; ImageNet's", optional=True)
    std: _three(1e-6) = _entry("of each channel, in [0, 1], for custom data; ImageNet's", optional=True)

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, view: Any) -> Any:
        if not isinstance(view, Mapping):
            return view
        return {key: value for key, value in view.items() if key not in _STEPS or value not in (None, {})}


_Views = Annotated[
    list[View], Field(min_length=1), Says("a list of views, each with rrc, color_jitter, ..., crop_size, num_crops")
]


class Views(Section):
    """The views alone."""

    augmentations: _Views = _entry("the views of an image that a method compares")


class Optimizer(Section):
    """The optimiser."""

    name: Literal["sgd", "lars", "adam", "adamw"] = _entry("optimiser")
    batch_size: _whole(1) = _entry("images of a batch, on each device")
    lr: _Positive = _entry("learning rate for 256 images: multiplied by batch size x devices x nodes / 256")
    weight_decay: _Positive = _entry("weight decay")
    exclude_bias_n_norm_wd: _Switch = _entry("whether biases and normalisation go without weight decay", False)
    kwargs: _Free = _entry("further arguments of the optimiser, such as momentum", {})


class PretrainOptimizer(Optimizer):
    """The optimiser of a pre-training."""

    batch_size: _whole(2) = _entry("images of a batch, on each device")
    classifier_lr: _Positive = _entry("learning rate of the online classifier, multiplied as lr")


class LinearOptimizer(Optimizer):
    """The optimiser of a linear evaluation."""

    layer_decay: _Positive = _entry("factor of the rate from layer to layer; with finetune, of a ViT", optional=True)


class Scheduler(Section):
    """The course of the learning rate."""

    name: Literal["warmup_cosine", "step", "none"] = _entry("its shape", "warmup_cosine")
    lr_decay_steps: Annotated[list[_whole(0)] | None, Says("a list of epochs")] = _entry(
        "step: epochs at which the rate is divided by 10", None
    )
    min_lr: _Positive = _entry("warmup_cosine: the rate at the end", 0.0)
    warmup_start_lr: _Positive = _entry("warmup_cosine: the rate at the beginning", 3e-5)
    warmup_epochs: _Positive = _entry("warmup_cosine: epochs until the whole rate is reached", 10)
    interval: Literal["step", "epoch"] = _entry("warmup_cosine: when the rate changes", "step")

    @model_validator(mode="after")
    def _check(self) -> "Scheduler":
        if self.name == "step" and self.lr_decay_steps is None:
            raise ValueError(".lr_decay_steps must be a list of epochs, got None")
        return self


class Momentum(Section):
    """The teacher, of methods that have one."""

    base_tau: _Share = _entry("its momentum at the beginning", 0.99)
    final_tau: _Share = _entry("its momentum at the end; both 0: the teacher is the student", 1.0)
    classifier: _Switch = _entry("whether a classifier is trained on the teacher's features too", False)

    @model_validator(mode="after")
    def _check(self) -> "Momentum":
        if self.base_tau > self.final_tau:
            raise ValueError(".base_tau must not be above momentum.final_tau")
        return self


class KNNEval(Section):
    """k-nearest-neighbour accuracy after each validation."""

    enabled: _Switch = _entry("whether it is computed", False)
    k: _whole(1) = _entry("neighbours", 20)
    distance_func: Literal["cosine", "euclidean"] = _entry("distance of features", "euclidean")


class Checkpoint(Section):
    """Where a run is written."""

    enabled: _Switch = _entry("whether checkpoints are written", True)
    dir: _Word = _entry("folder; the run is written to <dir>/<method>/<version>", "trained_models")
    frequency: _whole(1) = _entry("epochs between checkpoints", 1)
    keep_prev: _Switch = _entry("whether older checkpoints of the run are kept", False)
    version: _FileName | None = _entry("name of the run's folder; null: a random one", None)
    group: _Word | None = _entry("name of the folder above it; null: the method's, or linear", None)


class AutoResume(Section):
    """Going on from the newest checkpoint of the same run."""

    enabled: _Switch = _entry("whether it is looked for", False)
    max_hours: _Positive = _entry("age in hours of the oldest checkpoint to go on from", 36)


class AutoUMAP(Section):
    """Pictures of the validation images' features during training."""

    enabled: _Switch = _entry("whether they are drawn", False)
    dir: _Word = _entry("folder; pictures are written to <dir>/<method>/<version>", "auto_umap")
    frequency: _whole(1) = _entry("epochs between pictures", 1)


class Wandb(Section):
    """Weights & Biases."""

    enabled: _Switch = _entry("whether it is used; without an account it logs to ./wandb", False)
    entity: _Word | None = _entry("account; null: that of the login", None)
    project: _Word | None = _entry("project", "solo-learn")
    offline: _Switch = _entry("whether it logs to ./wandb only", False)


class Performance(Section):
    """Speed."""

    disable_channel_last: _Switch = _entry("whether the network keeps torch's usual memory format", False)


class Run(Section):
    """What a pre-training and a linear evaluation share."""

    name: _FileName = _entry("name of the run, in the names of its checkpoints", "run")
    backbone: Backbone = _entry("the network")
    max_epochs: _whole(0, 10**9) = _entry("epochs; 0 writes the untrained weights")
    scheduler: Scheduler = _section(Scheduler, "the course of the learning rate")
    accumulate_grad_batches: _whole(1) = _entry("batches whose gradients make one step", 1)
    dali: Dali = _entry("NVIDIA DALI, for data.format=dali", optional=True)
    checkpoint: Checkpoint = _section(Checkpoint, "where the run is written")
    auto_resume: AutoResume = _section(AutoResume, "going on from the newest checkpoint of the same run")
    resume_from_checkpoint: _Word | None = _entry("checkpoint to go on from", None)
    wandb: Wandb = _section(Wandb, "Weights & Biases")
    performance: Performance = _section(Performance, "speed")
    seed: _whole(0, 2**32 - 1) = _entry("of everything random", 5)
    devices: Annotated[Any, Says("a number above 0 or a list of indexes")] = _entry(
        "how many, or which: 2, [0, 1], auto", 1
    )
    num_nodes: _whole(1, 10**6) = _entry("machines", 1)
    accelerator: _Word = _entry("auto, cpu, gpu, or another that Lightning knows", "auto")
    strategy: _Word | None = _entry("auto, ddp, or another that Lightning knows", "auto")
    precision: Annotated[
        str | Annotated[int, Strict()] | None, Says("a precision that Lightning knows, such as 32 or 16-mixed")
    ] = _entry("number format: 32, 16-mixed, bf16-mixed, ...", 32)
    sync_batchnorm: _Switch = _entry("whether batch statistics are over all devices", False)
    variables: _Free = _entry("values of one's own, to which other entries refer as ${variables.NAME}", optional=True)
    log_every_n_steps: _whole(1) | None = _entry("steps between lines of metrics.csv; Lightning's", optional=True)


class Pretrain(Run):
    """A configuration of main_pretrain."""

    accumulate: Literal["mean", "joined"] = _entry(
        "what accumulated batches make; mean: the mean of their gradients; joined: that of one batch of all",
        "mean",
    )
    method: _Word = _entry("method; a wrong name is answered with all names")
    method_kwargs: _Free = _entry("options of the method; a wrong one is answered with all of them", {})
    data: Data = _entry("the images")
    augmentations: _Views = _entry("the views of an image that a method compares")
    optimizer: PretrainOptimizer = _entry("the optimiser")
    momentum: Momentum = _section(Momentum, "the teacher, of methods that have one")
    knn_eval: KNNEval = _section(KNNEval, "k-nearest-neighbour accuracy after each validation")
    auto_umap: AutoUMAP = _section(AutoUMAP, "pictures of the features during training")
    debug_augmentations: _Switch = _entry("whether the views' transforms are printed", False)
    check_val_every_n_epoch: _whole(1) | None = _entry("epochs between validations; Lightning's", optional=True)

    @model_validator(mode="before")
    @classmethod
    def _no_options(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if key != "method_kwargs" or value is not None}


class Linear(Run):
    """A configuration of main_linear."""

    data: LinearData = _entry("the images")
    optimizer: LinearOptimizer = _entry("the optimiser")
    max_epochs: _whole(1, 10**9) = _entry("epochs")
    pretrained_feature_extractor: _Word = _entry("checkpoint, or folder of a run, whose backbone is evaluated")
    pretrain_method: _Word | None = _entry("solo-learn's; no effect, the checkpoint says it", optional=True)
    finetune: _Switch = _entry("whether the backbone is trained too", False)
    normalized_classifier: _Switch = _entry("whether a BatchNorm without scale comes before the classifier", False)
    check_val_every_n_epoch: _whole(1) = _entry("epochs between validations", 1)
    auto_augment: _Switch = _entry("whether training images get timm's RandAugment and erasing", False)
    mixup: _Positive = _entry("alpha of Mixup; 0: none", 0.0)
    cutmix: _Positive = _entry("alpha of CutMix; 0: none", 0.0)
    label_smoothing: _number("a number, at least 0 and below 1", ge=0, lt=1) = _entry("label smoothing", 0.0)

    @model_validator(mode="after")
    def _check(self) -> "Linear":
        if (self.mixup or self.cutmix) and self.optimizer.batch_size % 2:
            batch = self.optimizer.batch_size
            raise ValueError(f"mixup and cutmix pair images: optimizer.batch_size must be even, got {batch}")
        return self


COMMANDS: dict[str, type[Run]] = {"main_pretrain": Pretrain, "main_linear": Linear}
"""The commands that read a configuration, and what they read."""


def validate(
    model: type[Section],
    given: Mapping[Any, Any],
    trainer: Mapping[str, Any] | None = None,
    variables: Collection[str] = (),
) -> dict[str, Any]:
    """Check a configuration and fill in what it leaves out.

    Args:
        model: what it has to be.
        given: plain dictionaries, lists and values.
        trainer: {argument: annotation} of Lightning's Trainer, which may stand at the top level too.
        variables: further entries that may stand there, because others refer to them.

    Returns:
        Plain dictionaries, lists and values; an optional entry that is left out stays out.

    Raises:
        UserError: it names all mistakes, one a line.
    """
    mistakes: list[str] = []
    left_out = {*IGNORED, *(key for key in variables if key not in model.model_fields)}
    given = _sorted_out({key: value for key, value in given.items() if key not in left_out}, (), mistakes)
    passed: dict[str, Any] = {}
    for key in [key for key in given if key in (trainer or {}) and key not in model.model_fields]:
        passed[key] = given.pop(key)
        if key in OURS:
            mistakes.append(f"{key} is set by the command: leave it out; {OURS[key]}")
        elif sentence := _argument(key, passed[key], trainer[key]):
            mistakes.append(sentence)
    checked = None
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        mistakes += [_sentence(model, given, one, tuple(trainer or ())) for one in error.errors(include_url=False)]
    if checked is None or mistakes:
        raise UserError(together(mistakes))
    return {**_plain(checked), **passed}


def together(mistakes: Sequence[str]) -> str:
    """Several sentences as one message, a line each, below one another behind "error: "."""
    return "\n       ".join(dict.fromkeys(mistakes))


def _sorted_out(value: Any, place: tuple[Any, ...], mistakes: list[str]) -> Any:
    """Without the entries that are still ???, which are mistakes; YAML files of solo-learn write None for null."""
    if isinstance(value, Mapping):
        kept = {}
        for key, entry in value.items():
            if isinstance(entry, str) and entry == "???":
                mistakes.append(f"the configuration needs a value for {_path((*place, key))}")
            else:
                kept[key] = None if entry == "None" else _sorted_out(entry, (*place, key), mistakes)
        return kept
    if isinstance(value, list):
        return [_sorted_out(entry, (*place, index), mistakes) for index, entry in enumerate(value)]
    return value


def _argument(key: str, value: Any, annotation: Any) -> str | None:
    """What is wrong with an argument of the Trainer, as far as its annotation says."""
    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(value)
    except ValidationError:
        return f"{key} must be {_kinds(annotation)}, got {value!r}"
    return None


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", NoneType: "null"}


def _kinds(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    parts = get_args(annotation)
    if not parts or get_origin(annotation) in (dict, list):
        kind = get_origin(annotation) or annotation
        return _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")
    kinds = list(_KINDS.values())
    found = {_kinds(part) for part in parts}  # the order of a Union is that of the first like it in the process
    return " or ".join(sorted(found, key=lambda kind: (kinds.index(kind) if kind in kinds else -1, kind)))


def _path(place: Sequence[Any]) -> str:
    """``("augmentations", 0, "rrc")`` → ``augmentations[0].rrc``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def _sections(annotation: Any) -> type[Section] | None:
    """The section that an annotation is, or that it lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_sections, get_args(annotation))), None)


def words(field: Any) -> str:
    """What the values of a field may be, in words to be put behind "must be"."""
    if isinstance(field, FieldInfo):
        said = [one.words for one in field.metadata if isinstance(one, Says)]
        return said[-1] if said else words(field.annotation)
    if get_origin(field) is Literal:
        return " or ".join(get_args(field))
    if said := [one.words for one in getattr(field, "__metadata__", ()) if isinstance(one, Says)]:
        return said[-1]
    if _sections(field):
        return _SECTION
    return next((words(part) for part in get_args(field)), str(field))


def _sentence(model: type[Section], given: Any, error: Mapping[str, Any], further: Sequence[str]) -> str:
    """One error of pydantic as a sentence: what was given, what is allowed."""
    place, kind = error["loc"], error["type"]
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return _path(place) + text if text[0] in " ." else text
    # the entry that is declared, which may be above the element that is wrong
    field, section, depth = None, model, 0
    for index, step in enumerate(place):
        if isinstance(step, int) or section is None:
            continue
        if step not in section.model_fields:
            break
        field, depth = section.model_fields[step], index + 1
        section = _sections(field.annotation)
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(model, section or model, place, further)
    if kind == "model_type" and not (error["input"] is None and field and field.is_required()):
        return f"{_path(place)} must be {_SECTION}, got {error['input']!r}"
    value = given
    for step in place[:depth]:
        value = value.get(step) if isinstance(value, Mapping) else value[step]
    path = _path(place[:depth])
    assert field is not None, error
    if kind == "missing" or (field.is_required() and value in (None, "", [])):
        return f"the configuration needs a value for {path}"
    if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) > 2:
        return f"unknown {path} {value!r}; choose from {', '.join(get_args(field.annotation))}"
    return f"{path} must be {words(field)}, got {value!r}"


def _unknown(model: type[Section], section: type[Section], place: Sequence[Any], further: Sequence[str]) -> str:
    """What to say of an entry that nobody knows: the nearest that there is."""
    key, above = str(place[-1]), _path(place[:-1])
    known = [*section.model_fields, *(() if above else further)]
    if not above:
        for command, other in COMMANDS.items():
            if key in other.model_fields and issubclass(model, Run):
                return f"{key} is an entry of {command} only: leave it out"
    # the entries beside it, and those of other sections by their last name
    names = {**{row.path.rpartition(".")[2]: row.path for row in rows(model)}, **{name: name for name in known}}
    near = next((names[name] for name in get_close_matches(key.lower(), names, 1, 0.65)), None)
    guess = f"; did you mean {near}?" if near else ""
    if above:
        return f"{above} has no entry {key!r}; it knows {', '.join(known)}{guess}"
    return f"the configuration has no entry {key!r}{guess or '; --help-config lists all'}"


def _plain(section: Section) -> dict[str, Any]:
    """A section as plain dictionaries and lists."""
    found: dict[str, Any] = {}
    for name, value in section:
        field = type(section).model_fields[name]
        if _optional(field) and value is None:
            if name in section.model_fields_set:
                found[name] = None
        elif isinstance(value, Section):
            found[name] = _plain(value)
        elif isinstance(value, list):
            found[name] = [_plain(entry) if isinstance(entry, Section) else entry for entry in value]
        else:
            found[name] = value
    return found


def _optional(field: FieldInfo) -> bool:
    return bool((field.json_schema_extra or {}).get("optional"))


def defaults(section: type[Section]) -> dict[str, Any]:
    """What a section is where it is left out, without the entries that must be given and those that stay out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if inner is not None and not _optional(field) and get_origin(field.annotation) is not list:
            found[name] = defaults(inner)
        elif not field.is_required() and not _optional(field):
            found[name] = field.get_default(call_default_factory=True)
    return found


class Row(NamedTuple):
    """An entry as the tables show it.

    Args:
        path: such as ``augmentations[].rrc.enabled``.
        words: what it may be.
        default: its value where it is left out, "needed", or "-" where there is none.
        meaning: what it is.
    """

    path: str
    words: str
    default: str
    meaning: str


def rows(section: type[Section], above: str = "") -> Iterator[Row]:
    """Every entry of a section and of those in it, those of sections last."""
    inner = []
    for name, field in section.model_fields.items():
        below = _sections(field.annotation)
        if below is not None:
            brackets = "[]" if get_origin(field.annotation) is list else ""
            inner.append((below, f"{above}{name}{brackets}."))
            continue
        if field.is_required():
            default = "needed"
        elif _optional(field):
            default = "-"
        else:
            default = str(field.get_default(call_default_factory=True))
            default = {"None": "null", "True": "true", "False": "false"}.get(default, default)
        yield Row(above + name, words(field), default, field.description or "")
    for below, path in inner:
        yield from rows(below, path)


def help_text(command: str) -> str:
    """What ``--help-config`` prints: a line for each entry of a command's configuration."""
    lines = [f"entries of a configuration of {command}; + any argument of Lightning's Trainer", ""]
    for row in rows(COMMANDS[command]):
        default = {"needed": "needed", "-": "optional"}.get(row.default, f"default {row.default}")
        lines.append(f"{row.path}: {row.words}, {default}\n    {row.meaning}")
    return "\n".join(lines)


def markdown() -> str:
    """docs/solo_options.md."""
    tables = {command: list(rows(model)) for command, model in COMMANDS.items()}
    lines = [
        "# Entries of a solo-learn configuration",
        "",
        "Made by `python -m solo_ext.schema > docs/solo_options.md`; edit solo_ext/schema.py, not this file.",
        "",
        "The format is that of solo-learn's main branch. An entry that is not listed here is an error, except for the",
        "arguments of Lightning's `Trainer`, which may stand at the top level too, and entries to which another refers",
        "as `${NAME}`. Without a default: needed means that it must be given, - that it may be left out.",
        "`python -m solo_ext.main_pretrain --help-config` prints the same.",
    ]
    for command, table in tables.items():
        lines += ["", f"## {command}", "", "| entry | may be | default | meaning |", "|---|---|---|---|"]
        if command == "main_linear":
            shared = set(tables["main_pretrain"])
            lines[-3:-3] = ["", "Beside those of main_pretrain that are marked ¹:"]
            table = [row for row in table if row not in shared]
        else:
            both = set(tables["main_linear"])
            table = [row._replace(path=row.path + ("¹" if row in both else "")) for row in table]
        lines += [f"| {row.path} | {row.words} | {row.default} | {row.meaning} |".replace("<", r"\<") for row in table]
    lines += ["", "¹ main_linear reads it too.", "", "## Without effect", "", "| entry | why |", "|---|---|"]
    lines += [f"| {key} | {reason} |" for key, reason in IGNORED.items()]
    lines += ["", "## Set by the commands", "", "| entry | instead |", "|---|---|"]
    lines += [f"| {key} | {reason} |" for key, reason in OURS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
