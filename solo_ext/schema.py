"""The schema of a configuration: meaning, type, range and default of every entry.

The schema defines the checks, the output of ``--help-config`` and docs/solo_options.md, which ``python -m
solo_ext.schema`` prints. The format is that of solo-learn's main branch. :func:`validate` reports all errors at once.
:mod:`solo_ext.config` checks what depends on the machine, on files or on other packages; each method checks its own
options. This module imports neither torch nor solo-learn.
"""

from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, model_validator

from plugins.tools.command import UserError, did_you_mean, nearest
from plugins.tools.schema import (
    SECTION,
    Allowed,
    Boolean,
    Fraction,
    NonNegative,
    PathString,
    Section,
    String,
    allowed_values,
    entry,
    integer,
    is_optional,
    join_messages,
    real_number,
    rows,
    section_of,
    table,
    triple,
)

IGNORED = {
    "augmentations_cfg": "in main's scripts/pretrain/imagenet-100/simsiam.yaml; no version of solo-learn reads it",
    "wandb_cfg": "in main's scripts/pretrain/imagenet-100/simsiam.yaml; no version of solo-learn reads it",
    "defaults": "Hydra's list of further files; Hydra removes it",
    "hydra": "Hydra's own section; Hydra removes it",
}
"""Top-level entries that are accepted and ignored, and the reason."""
FORK_ENTRIES = {
    "rectified_lpjepa": {
        ("mlp_probe",): "main_probe trains probes after the pre-training",
        ("data", "preload"): "images are read from the files",
        ("method_kwargs", "add_projector_classifier"): "the online classifier sees the features",
        ("method_kwargs", "logging_interval"): "log_every_n_steps is the interval",
    }
}
"""Entries of the forks' files of a method that are announced and ignored, and the reason."""
SET_BY_COMMANDS = {
    "logger": "metrics.csv and TensorBoard are always written, wandb.enabled=true adds Weights & Biases",
    "callbacks": "a configuration cannot contain callbacks",
    "enable_checkpointing": "use checkpoint.enabled",
    "use_distributed_sampler": "the data loaders divide the images among the processes",
}
"""Arguments of Lightning's Trainer that the commands set, and what to use instead."""


def _no_slash(value: Any) -> Any:
    if isinstance(value, str) and "/" in value:
        raise ValueError(f" is part of a file name and must not contain a slash, got {value!r}")
    return value


_FileName = Annotated[String, BeforeValidator(_no_slash), Allowed("a string without a slash")]
_Side = integer(1, 16384)
_Free = Annotated[dict[str, Any], Allowed(SECTION)]


def _section(cls: type[Section], meaning: str) -> Any:
    return Field(default_factory=cls, description=meaning)


def _needs(section: Section, *names: str) -> None:
    """Check that a section has certain entries."""
    for name in names:
        if getattr(section, name) is None:
            raise ValueError(f".{name} must be {allowed_values(type(section).model_fields[name])}, got None")


class Backbone(Section):
    """The network."""

    name: String = entry("network, such as resnet18 or vit_tiny; the error for an unknown name lists all names")
    kwargs: _Free = entry("arguments of the network's constructor", {})


class Data(Section):
    """The images."""

    dataset: Literal["cifar10", "cifar100", "stl10", "tinyimagenet", "imagenet100", "imagenet", "custom", "digits"] = (
        entry("data set; custom: your own folder, with a subfolder for each class")
    )
    train_path: PathString = entry("folder of the training images; h5: the file; CIFAR and STL-10: the download folder")
    val_path: PathString | None = entry("the same for the validation images; null: no validation", None)
    format: Literal["image_folder", "dali", "h5"] = entry("reader of the images", "image_folder")
    num_workers: integer(0, 1024) = entry(
        "worker processes of the data loader; 0: the training process reads the images", 4
    )
    no_labels: Boolean = entry(
        "custom data: whether the images have no labels; they are in the folder itself or in subfolders", False
    )
    fraction: real_number("above 0 and at most 1, or -1 for all images", ge=-1, le=1) = entry(
        "fraction of the training images of each class to use; -1: all", -1
    )
    drop_last: Boolean = entry(
        "main_pretrain: whether the last batch of an epoch is left out if it is smaller; default: true", optional=True
    )
    skip_bad_images: Boolean = entry(
        "whether to go on if an image cannot be decoded: training takes the next image, validation leaves it out",
        False,
    )

    @model_validator(mode="after")
    def _check_bad_images(self) -> "Data":
        if self.skip_bad_images and self.format == "dali":
            raise ValueError(
                ".skip_bad_images=true is not possible with data.format=dali, which stops at an image that it cannot "
                "decode; use data.format=image_folder"
            )
        return self

    @model_validator(mode="after")
    def _check_fraction(self) -> "Data":
        if self.fraction != -1 and self.fraction <= 0:
            raise ValueError(f".fraction must be above 0 and at most 1, or -1 for all images, got {self.fraction:g}")
        return self


class LinearAugmentations(Section):
    """Crops and normalisation of a linear evaluation."""

    crop_size: _Side = entry(
        "side of training and validation images in pixels; default: that of the data set", optional=True
    )
    crop_min_scale: real_number("in (0, 1]", gt=0, le=1) = entry(
        "smallest crop as a fraction of the image's area; default: 0.08", optional=True
    )
    mean: triple("at least 0", ge=0) = entry(
        "for each channel, in [0, 1], for custom data; default: that of ImageNet", optional=True
    )
    std: triple("at least 1e-06", ge=1e-6) = entry(
        "for each channel, in [0, 1], for custom data; default: that of ImageNet", optional=True
    )


class LinearData(Data):
    """The images of a linear evaluation."""

    val_path: PathString = entry("the same for the validation images")
    augmentations: LinearAugmentations = entry("crops and normalisation", optional=True)


class Dali(Section):
    """NVIDIA DALI, for ``data.format=dali``."""

    device: Literal["cpu", "gpu"] = entry(
        "device that decodes images; default: the device of the network", optional=True
    )
    encode_indexes_into_labels: Boolean = entry(
        "accepted for compatibility with solo-learn and ignored: indexes are always correct", False
    )


class Crop(Section):
    """A random resized crop."""

    enabled: Boolean = entry("true: a random crop; false: the centre crop of the resized image")
    crop_min_scale: Fraction = entry("smallest fraction of the image's area, above 0", optional=True)
    crop_max_scale: Fraction = entry("largest fraction of the image's area", optional=True)

    @model_validator(mode="after")
    def _check(self) -> "Crop":
        if self.enabled:
            _needs(self, "crop_min_scale", "crop_max_scale")
            if not 0 < self.crop_min_scale <= self.crop_max_scale:
                raise ValueError(".crop_min_scale must be above 0 and not above crop_max_scale")
        return self


class Step(Section):
    """A step of an augmentation."""

    enabled: Boolean = entry("false disables the step, whatever prob is", optional=True)
    prob: Fraction = entry("probability")

    @model_validator(mode="after")
    def _switch(self) -> "Step":
        if self.enabled is False:
            self.prob = 0.0  # some of main's files have both entries, of which main reads only prob
        return self


class Jitter(Step):
    """Random changes of colour with the parameters of torchvision's ColorJitter, which are required if prob > 0."""

    brightness: NonNegative = entry("x, for a random factor in [1 - x, 1 + x]", optional=True)
    contrast: NonNegative = entry("x, for a random factor in [1 - x, 1 + x]", optional=True)
    saturation: NonNegative = entry("x, for a random factor in [1 - x, 1 + x]", optional=True)
    hue: real_number("in [0, 0.5]", ge=0, le=0.5) = entry(
        "x, for a random rotation of the hue in [-x, x] of the circle", optional=True
    )

    @model_validator(mode="after")
    def _check(self) -> "Jitter":
        if self.prob > 0:
            _needs(self, "brightness", "contrast", "saturation", "hue")
        return self


class Shift(Step):
    """A translation by a whole number of pixels in both directions; the gap shows the image's reflection."""

    pixels: integer(1, 1024) = entry("largest translation in pixels, below crop_size", 4)


_STEPS = (
    "translate",
    "color_jitter",
    "photometric",
    "grayscale",
    "gaussian_blur",
    "solarization",
    "equalization",
    "horizontal_flip",
)


def _step(cls: type[Step], meaning: str) -> Any:
    return Field(default_factory=lambda: cls(prob=0.0), description=meaning)


class Jigsaw(Section):
    """A stack of patches: the cells of a random crop, in random order."""

    side: _Side = entry("side of the crop that is cut into cells, in pixels; a multiple of grid")
    grid: integer(1, 16) = entry("cells per side; the stack has grid x grid patches", 3)


class Grid(Section):
    """A stack of patches: a grid of patches of a random crop, row by row, which may overlap."""

    side: _Side = entry("side of the crop that is cut into patches, in pixels; with rrc.enabled=false not resized")
    stride: integer(1, 16384) = entry("distance of neighbouring patches in pixels")
    window: integer(1, 16384) = entry(
        "side of a random window in each patch, outside of which it is black; default: the whole patch", optional=True
    )
    padding: integer(0, 16384) = entry("black pixels at each border of the image before the crop", 0)


def _steps_of(value: Any) -> Any:
    """Check a list of steps by building them."""
    from plugins.tools.steps import build_steps  # torchvision is needed only here

    if not isinstance(value, list):
        raise ValueError(
            f" must be a list of steps, each a name or a mapping of one name to its options, got {value!r}"
        )
    try:
        build_steps(value)
    except ValueError as error:
        raise ValueError(f": {error}") from None
    return value


_Steps = Annotated[
    list[Any], BeforeValidator(_steps_of), Allowed("a list of steps, each a name or a mapping of it to its options")
]


class Masks(Section):
    """Removal of the background of the whole image before the crop, as in ReLICv2, with a folder of masks."""

    folder: PathString = entry(
        "folder of masks, each with the path that its image has below data.train_path; black is background"
    )
    prob: Fraction = entry("probability that the background is removed, for each crop", 0.1)
    fill: Literal["random", "gray", "black"] = entry("grey level in place of the background", "random")


class View(Section):
    """Crops of an image with the same augmentation. Missing steps are disabled."""

    rrc: Crop = entry("random resized crop")
    translate: Shift = _step(Shift, "translation, after the crop")
    color_jitter: Jitter = _step(Jitter, "changes of colour")
    photometric: Step = _step(Step, "posterisation, sharpness, solarisation and contrast, as in PIRL")
    grayscale: Step = _step(Step, "conversion to grey")
    gaussian_blur: Step = _step(Step, "blur with a width of 0.1 to 2 pixels")
    solarization: Step = _step(Step, "inversion of values above one half")
    equalization: Step = _step(Step, "histogram equalisation")
    horizontal_flip: Step = _step(Step, "horizontal flip")
    crop_size: _Side = entry(
        "side in pixels; views with the size of the first entry are large crops, the others are small crops"
    )
    num_crops: integer(1, 1024) = entry("number of crops of each image")
    jigsaw: Jigsaw | None = entry(
        "makes a stack of patches, each of side crop_size and augmented independently, instead of a view", optional=True
    )
    rotation: Boolean = entry(
        "makes a stack of one view that is turned by 0, 90, 180 or 270 degrees, instead of a view", False
    )
    grid: Grid | None = entry(
        "makes a stack of patches of one grid, each with crop_size and with the colours of its own, instead of a view; "
        "horizontal_flip mirrors the whole grid",
        optional=True,
    )
    masks: Masks | None = entry(
        "removes the background of some images before the crop; for the large crops of relicv2", optional=True
    )
    mean: triple("at least 0", ge=0) = entry(
        "for each channel, in [0, 1], for custom data; default: that of ImageNet", optional=True
    )
    std: triple("at least 1e-06", ge=1e-6) = entry(
        "for each channel, in [0, 1], for custom data; default: that of ImageNet", optional=True
    )
    steps: _Steps = entry(
        "all transforms of an image in this order, in place of rrc ... horizontal_flip, the conversion to a tensor and "
        "the normalisation; see plugins/tools/steps.py",
        optional=True,
    )
    patch_steps: _Steps = entry("with jigsaw or grid and steps: the transforms of each patch", optional=True)
    eval_steps: _Steps = entry(
        "first view: the transforms of the images of evaluation; default: those of the data set", optional=True
    )

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, view: Any) -> Any:
        if not isinstance(view, Mapping):
            return view
        kept = {key: value for key, value in view.items() if key not in _STEPS or value not in (None, {})}
        if kept.get("steps") is not None:
            kept.setdefault("rrc", {"enabled": False})
        return kept

    @model_validator(mode="after")
    def _check_steps(self) -> "View":
        if self.steps is None:
            if self.patch_steps is not None:
                raise ValueError(".patch_steps needs steps; add steps, which may be an empty list")
            return self
        given = [name for name in _STEPS if getattr(self, name).prob] + ["rrc"] * self.rrc.enabled
        if given:
            raise ValueError(f".steps replaces {', '.join(given)}: remove {'them' if len(given) > 1 else 'it'}")
        stack = self.jigsaw is not None or self.grid is not None
        if self.rotation:
            raise ValueError(".rotation is not available with steps; remove one of them")
        if stack != (self.patch_steps is not None):
            raise ValueError(".patch_steps must be given with steps and jigsaw or grid, and only then")
        return self

    @model_validator(mode="after")
    def _check(self) -> "View":
        kinds = {"jigsaw": self.jigsaw is not None, "rotation": self.rotation, "grid": self.grid is not None}
        if len(given := [name for name, is_given in kinds.items() if is_given]) > 1:
            raise ValueError(f": {' and '.join(given)} exclude each other")
        if self.grid is not None:
            self._check_grid(self.grid)
        if (self.jigsaw is not None or self.rotation) and not self.rrc.enabled and self.steps is None:
            raise ValueError(".rrc.enabled must be true for a stack of patches, got false")
        if self.translate.prob and self.translate.pixels >= self.crop_size:
            raise ValueError(
                f".translate.pixels must be below crop_size, got {self.translate.pixels} and crop_size {self.crop_size}"
            )
        if self.jigsaw is not None and (
            self.jigsaw.side % self.jigsaw.grid or self.crop_size > self.jigsaw.side // self.jigsaw.grid
        ):
            raise ValueError(
                f".jigsaw.side must be a multiple of grid, and crop_size at most side / grid, got side "
                f"{self.jigsaw.side}, grid {self.jigsaw.grid} and crop_size {self.crop_size}"
            )
        return self

    def _check_grid(self, grid: Grid) -> None:
        if grid.side < self.crop_size or (grid.side - self.crop_size) % grid.stride:
            raise ValueError(
                f".grid.side must be crop_size plus a multiple of grid.stride, got side {grid.side}, stride "
                f"{grid.stride} and crop_size {self.crop_size}"
            )
        if grid.window is not None and grid.window > self.crop_size:
            raise ValueError(f".grid.window must be at most crop_size = {self.crop_size}, got {grid.window}")


_Views = Annotated[
    list[View], Field(min_length=1), Allowed("a list of views, each with rrc, color_jitter, ..., crop_size, num_crops")
]


class Views(Section):
    """A configuration that contains only the views."""

    augmentations: _Views = entry("the views of an image that a method compares")


class Optimizer(Section):
    """The optimiser."""

    name: Literal["sgd", "lars", "adam", "adamw"] = entry("optimiser")
    batch_size: integer(1) = entry("batch size on each device")
    lr: NonNegative = entry("learning rate for 256 images: multiplied by batch size x devices x nodes / 256")
    weight_decay: NonNegative = entry("weight decay")
    exclude_bias_n_norm_wd: Boolean = entry("whether biases and normalisation layers have no weight decay", False)
    kwargs: _Free = entry("further arguments of the optimiser, such as momentum", {})


class PretrainOptimizer(Optimizer):
    """The optimiser of a pre-training."""

    batch_size: integer(2) = entry("batch size on each device")
    classifier_lr: NonNegative = entry("learning rate of the online classifier, multiplied in the same way as lr")
    final_weight_decay: NonNegative = entry(
        "weight decay at the end of the run, towards which it moves from weight_decay by half a cosine, once an epoch; "
        "default: weight_decay",
        optional=True,
    )

    @model_validator(mode="after")
    def _check_decay(self) -> "PretrainOptimizer":
        if self.final_weight_decay is not None and not self.weight_decay:
            raise ValueError(".weight_decay must be above 0 with final_weight_decay, got 0")
        return self


class LinearOptimizer(Optimizer):
    """The optimiser of a linear evaluation."""

    backbone_lr: NonNegative = entry(
        "learning rate of the backbone with finetune, multiplied in the same way as lr; default: lr", optional=True
    )
    layer_decay: NonNegative = entry(
        "ratio of the learning rates of successive layers; only with finetune and a ViT", optional=True
    )


class Scheduler(Section):
    """The schedule of the learning rate."""

    name: Literal["warmup_cosine", "step", "exponential", "reduce", "ssv", "none"] = entry(
        "type of the schedule; reduce: the learning rate falls when train_loss has stopped falling; ssv: warm-up by "
        "epochs, as in Self-Supervised-Vision, followed by decay",
        "warmup_cosine",
    )
    decay: Literal["cosine", "step", "none"] = entry(
        "ssv: after warmup_epochs, to 0, or by lr_decay_factor lr_decay_steps epochs later; default: cosine",
        optional=True,
    )
    lr_decay_steps: Annotated[list[integer(0)] | None, Allowed("a list of epochs")] = entry(
        "step: epochs at which the learning rate is reduced", None
    )
    gamma: Fraction = entry("exponential: factor of the learning rate after each epoch", 0.95)
    factor: Fraction = entry("reduce: factor of the learning rate", 0.1)
    patience: integer(0) = entry("reduce: epochs without a lower loss before the learning rate falls", 10)
    lr_decay_factor: real_number("above 0, at most 1", gt=0, le=1) = entry(
        "step: factor of the learning rate at each of these epochs", 0.1
    )
    warmup_steps: integer(0) = entry("step: optimiser steps of linear warm-up", 0)
    min_lr: NonNegative = entry("warmup_cosine: final learning rate", 0.0)
    warmup_start_lr: NonNegative = entry("warmup_cosine: initial learning rate", 3e-5)
    warmup_epochs: NonNegative = entry("warmup_cosine: epochs of linear warm-up", 10)
    interval: Literal["step", "epoch"] = entry(
        "warmup_cosine: whether the learning rate changes in each step or each epoch", "step"
    )

    @model_validator(mode="after")
    def _check(self) -> "Scheduler":
        if (self.name == "step" or self.decay == "step") and self.lr_decay_steps is None:
            raise ValueError(".lr_decay_steps must be a list of epochs, got None")
        if self.factor >= 1:
            raise ValueError(f".factor must be in [0, 1), got {self.factor}")
        return self


class Momentum(Section):
    """The teacher, for methods that have one."""

    base_tau: Fraction = entry("initial momentum", 0.99)
    final_tau: Fraction = entry("final momentum; if both are 0, the teacher is the student", 1.0)
    classifier: Boolean = entry("whether to train a second online classifier on the teacher's features", False)

    @model_validator(mode="after")
    def _check(self) -> "Momentum":
        if self.base_tau > self.final_tau:
            raise ValueError(".base_tau must not be above momentum.final_tau")
        return self


class KNNEval(Section):
    """The k-nearest-neighbour accuracy after each validation."""

    enabled: Boolean = entry("whether it is computed", False)
    k: integer(1) = entry("number of neighbours", 20)
    distance_func: Literal["cosine", "euclidean"] = entry("distance between features", "euclidean")


class Checkpoint(Section):
    """The folder and the checkpoints of a run."""

    enabled: Boolean = entry("whether to write checkpoints", True)
    dir: PathString = entry("folder; a run is written to <dir>/<method>/<version>", "trained_models")
    frequency: integer(1) = entry("epochs between checkpoints", 1)
    keep_prev: Boolean = entry("whether to keep older checkpoints of the run", False)
    version: _FileName | None = entry("name of the run's folder; null: a random name", None)
    group: String | None = entry("name of its parent folder; null: the name of the method, or linear", None)


class AutoResume(Section):
    """Resuming from the newest checkpoint of the same run."""

    enabled: Boolean = entry("whether to look for such a checkpoint", False)
    max_hours: NonNegative = entry("maximum age of that checkpoint in hours", 36)


class AutoUMAP(Section):
    """Pictures of the validation images' features during training."""

    enabled: Boolean = entry("whether to draw them", False)
    dir: PathString = entry("folder; pictures are written to <dir>/<method>/<version>", "auto_umap")
    frequency: integer(1) = entry("epochs between pictures", 1)


class Wandb(Section):
    """Weights & Biases."""

    enabled: Boolean = entry(
        "whether to log to Weights & Biases; without an account, logs are written to ./wandb", False
    )
    entity: String | None = entry("account; null: the account of the login", None)
    project: String | None = entry("project", "solo-learn")
    offline: Boolean = entry("whether logs are written only to ./wandb", False)


class Performance(Section):
    """Speed."""

    disable_channel_last: Boolean = entry(
        "whether to use torch's default memory format instead of channels_last", False
    )


class Run(Section):
    """The entries of both commands."""

    name: _FileName = entry("name of the run, part of the names of its checkpoints", "run")
    backbone: Backbone = entry("the network")
    max_epochs: integer(0, 10**9) = entry("epochs; 0: write the untrained weights")
    scheduler: Scheduler = _section(Scheduler, "schedule of the learning rate")
    accumulate_grad_batches: integer(1) = entry("number of batches in a step of the optimiser", 1)
    dali: Dali = entry("NVIDIA DALI, for data.format=dali", optional=True)
    checkpoint: Checkpoint = _section(Checkpoint, "folder and checkpoints")
    auto_resume: AutoResume = _section(AutoResume, "resuming from the newest checkpoint of the same run")
    resume_from_checkpoint: PathString | None = entry("checkpoint, or folder of a run, to resume from", None)
    wandb: Wandb = _section(Wandb, "Weights & Biases")
    performance: Performance = _section(Performance, "speed")
    seed: integer(0, 2**32 - 1) = entry("seed of all random numbers", 5)
    devices: Annotated[Any, Allowed("a number above 0 or a list of indexes")] = entry(
        "number or indexes of the devices, or auto: 2, [0, 1], auto", 1
    )
    num_nodes: integer(1, 10**6) = entry("number of machines", 1)
    accelerator: String = entry("auto, cpu, gpu, or another accelerator of Lightning", "auto")
    strategy: String | None = entry("auto, ddp, or another strategy of Lightning", "auto")
    precision: Annotated[
        str | Annotated[int, Strict()] | None, Allowed("a precision of Lightning, such as 32 or 16-mixed")
    ] = entry("floating-point precision: 32, 16-mixed, bf16-mixed, ...", 32)
    sync_batchnorm: Boolean = entry("whether batch norm uses the statistics of all devices", False)
    variables: _Free = entry("your own values, for use in other entries as ${variables.NAME}", optional=True)
    log_every_n_steps: integer(1) | None = entry(
        "steps between rows of metrics.csv; default: that of Lightning", optional=True
    )


class Pretrain(Run):
    """A configuration of main_pretrain."""

    accumulate: Literal["mean", "joined"] = entry(
        "loss of accumulated batches; mean: the mean of their losses; joined: the loss of their joined rows",
        "mean",
    )
    method: String = entry("method; the error for an unknown name lists all names")
    method_kwargs: _Free = entry("options of the method; the error for an unknown option lists all options", {})
    data: Data = entry("the images")
    augmentations: _Views = entry("the views of an image that a method compares")
    shared_flip: Fraction = entry(
        "probability that all views of an image are flipped horizontally together, besides their own horizontal_flip",
        0.0,
    )
    optimizer: PretrainOptimizer = entry("the optimiser")
    momentum: Momentum = _section(Momentum, "the teacher, for methods that have one")
    knn_eval: KNNEval = _section(KNNEval, "k-nearest-neighbour accuracy after each validation")
    auto_umap: AutoUMAP = _section(AutoUMAP, "pictures of the features during training")
    debug_augmentations: Boolean = entry("whether to print the transforms of the views", False)
    check_val_every_n_epoch: integer(1) | None = entry(
        "epochs between validations; default: that of Lightning", optional=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_options(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if key != "method_kwargs" or value is not None}


class Linear(Run):
    """A configuration of main_linear."""

    data: LinearData = entry("the images")
    optimizer: LinearOptimizer = entry("the optimiser")
    max_epochs: integer(1, 10**9) = entry("epochs")
    pretrained_feature_extractor: PathString = entry("checkpoint, or folder of a run, of the backbone to evaluate")
    pretrain_method: String | None = entry(
        "accepted for compatibility with solo-learn and ignored: the checkpoint contains the method", optional=True
    )
    finetune: Boolean = entry("whether to train the backbone too", False)
    normalized_classifier: Boolean = entry("whether a BatchNorm without scale and shift precedes the classifier", False)
    check_val_every_n_epoch: integer(1) = entry("epochs between validations", 1)
    auto_augment: Boolean = entry(
        "whether to augment training images with timm's RandAugment and random erasing", False
    )
    mixup: NonNegative = entry("alpha of Mixup; 0: no Mixup", 0.0)
    cutmix: NonNegative = entry("alpha of CutMix; 0: no CutMix", 0.0)
    label_smoothing: real_number("a number, at least 0 and below 1", ge=0, lt=1) = entry("label smoothing", 0.0)

    @model_validator(mode="after")
    def _check(self) -> "Linear":
        if (self.mixup or self.cutmix) and self.optimizer.batch_size % 2:
            batch = self.optimizer.batch_size
            raise ValueError(
                f"mixup and cutmix combine pairs of images: optimizer.batch_size must be even, got {batch}"
            )
        return self


COMMANDS: dict[str, type[Run]] = {"main_pretrain": Pretrain, "main_linear": Linear}
"""The schema of each command's configuration."""


def validate(
    model: type[Section],
    given: Mapping[Any, Any],
    trainer: Mapping[str, Any] | None = None,
    variables: Collection[str] = (),
) -> dict[str, Any]:
    """Validate a configuration and fill in the defaults.

    Args:
        model: the schema.
        given: the configuration as plain dictionaries, lists and values.
        trainer: {argument: annotation} of Lightning's Trainer; its arguments are allowed at the top level.
        variables: further entries that are allowed at the top level, because other entries refer to them.

    Returns:
        The configuration as plain values; a missing optional entry stays missing.

    Raises:
        UserError: the message lists all errors, one per line.
    """
    messages: list[str] = []
    ignored = {*IGNORED, *(key for key in variables if key not in model.model_fields)}
    given = _normalised({key: value for key, value in given.items() if key not in ignored}, (), messages)
    passed: dict[str, Any] = {}
    for key in [key for key in given if key in (trainer or {}) and key not in model.model_fields]:
        passed[key] = given.pop(key)
        if key in SET_BY_COMMANDS:
            messages.append(f"the command sets {key}: remove it; {SET_BY_COMMANDS[key]}")
        elif message := _argument_error(key, passed[key], trainer[key]):
            messages.append(message)
    checked = None
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        messages += [_message(model, given, one, tuple(trainer or ())) for one in error.errors(include_url=False)]
    if checked is None or messages:
        raise UserError(join_messages(messages))
    return {**_plain(checked), **passed}


def _normalised(value: Any, place: tuple[Any, ...], messages: list[str]) -> Any:
    """Convert None to null, as in solo-learn's files, and remove entries with the value ???, which are errors."""
    if isinstance(value, Mapping):
        kept = {}
        for key, entry in value.items():
            if isinstance(entry, str) and entry == "???":
                messages.append(f"the configuration needs a value for {_path((*place, key))}")
            else:
                kept[key] = None if entry == "None" else _normalised(entry, (*place, key), messages)
        return kept
    if isinstance(value, list):
        return [_normalised(entry, (*place, index), messages) for index, entry in enumerate(value)]
    return value


def _argument_error(key: str, value: Any, annotation: Any) -> str | None:
    """Return the error message for an argument of the Trainer that does not fit its annotation, or None if it fits."""
    try:
        TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, strict=True)).validate_python(value)
    except ValidationError:
        return f"{key} must be {_type_names(annotation)}, got {value!r}"
    return None


_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}


def _type_names(annotation: Any) -> str:
    """Describe the types that an annotation allows."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    parts = get_args(annotation)
    if not parts or get_origin(annotation) in (dict, list):
        kind = get_origin(annotation) or annotation
        return _TYPE_NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")
    order = list(_TYPE_NAMES.values())
    found = {_type_names(part) for part in parts}  # sorted below, since Python does not keep the order of a Union
    return " or ".join(sorted(found, key=lambda name: (order.index(name) if name in order else -1, name)))


def _path(place: Sequence[Any]) -> str:
    """Format the path of an entry: ``("augmentations", 0, "rrc")`` becomes ``augmentations[0].rrc``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def _message(model: type[Section], given: Any, error: Mapping[str, Any], further: Sequence[str]) -> str:
    """Convert an error of pydantic to a message that states what was given and what is allowed."""
    place, kind = error["loc"], error["type"]
    if kind == "value_error":
        text = str(error["ctx"]["error"])
        return _path(place) + text if text[0] in " .:" else text
    # find the innermost entry of the schema on the path of the error; the error may be in an element of its value
    field, section, depth = None, model, 0
    for index, step in enumerate(place):
        if isinstance(step, int) or section is None:
            continue
        if step not in section.model_fields:
            break
        field, depth = section.model_fields[step], index + 1
        section = section_of(field.annotation)
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown_entry(model, section or model, place, further)
    if kind == "model_type" and not (error["input"] is None and field and field.is_required()):
        return f"{_path(place)} must be {SECTION}, got {error['input']!r}"
    value = given
    for step in place[:depth]:
        value = value.get(step) if isinstance(value, Mapping) else value[step]
    path = _path(place[:depth])
    assert field is not None, error
    if kind == "missing" or (field.is_required() and value in (None, "", [])):
        return f"the configuration needs a value for {path}"
    if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) > 2:
        choices = get_args(field.annotation)
        return f"unknown {path} {value!r}; choose from {', '.join(choices)}{did_you_mean(value, choices)}"
    return f"{path} must be {allowed_values(field)}, got {value!r}"


def unknown_entry(model: type[Section], key: str, further: Sequence[str] = ()) -> str | None:
    """Return the error message for the path of an entry that the schema does not have, or None if it has the entry.

    Args:
        model: the schema.
        key: the path, such as ``augmentations.0.rrc.enabled``.
        further: further entries that are allowed at the top level.
    """
    section: type[Section] | None = model
    steps = [int(step) if step.isdecimal() else step for step in key.split(".")]
    for depth, step in enumerate(steps):
        if isinstance(step, int):
            continue
        if section is None or (depth == 0 and step in further):
            return None
        if step not in section.model_fields:
            return _unknown_entry(model, section, steps[: depth + 1], further)
        section = section_of(section.model_fields[step].annotation)
    return None


def _unknown_entry(model: type[Section], section: type[Section], place: Sequence[Any], further: Sequence[str]) -> str:
    """Return the error message for an unknown entry, with the most similar known entry."""
    key, above = str(place[-1]), _path(place[:-1])
    known = [*section.model_fields, *(() if above else further)]
    if not above:
        for command, other in COMMANDS.items():
            if key in other.model_fields and issubclass(model, Run):
                return f"only {command} has the entry {key}: remove it"
    # the entries of this section, and those of other sections by the last part of their path
    names = {**{row.path.rpartition(".")[2]: row.path for row in rows(model)}, **{name: name for name in known}}
    near = nearest(key.lower(), names, cutoff=0.65)
    guess = f"; did you mean {names[near]}?" if near else ""
    if above:
        return f"{above} has no entry {key!r}; known entries: {', '.join(known)}{guess}"
    end = "--help-config lists all" if issubclass(model, Run) else f"known entries: {', '.join(known)}"
    return f"the configuration has no entry {key!r}{guess or f'; {end}'}"


def _plain(section: Section) -> dict[str, Any]:
    """Convert a section to plain dictionaries and lists."""
    found: dict[str, Any] = {}
    for name, value in section:
        field = type(section).model_fields[name]
        if is_optional(field) and value is None:
            if name in section.model_fields_set:
                found[name] = None
        elif isinstance(value, Section):
            found[name] = _plain(value)
        elif isinstance(value, list):
            found[name] = [_plain(entry) if isinstance(entry, Section) else entry for entry in value]
        else:
            found[name] = value
    return found


def defaults(section: type[Section]) -> dict[str, Any]:
    """Return the defaults of a section, without required and optional entries."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None and not is_optional(field) and get_origin(field.annotation) is not list:
            found[name] = defaults(inner)
        elif not field.is_required() and not is_optional(field):
            found[name] = field.get_default(call_default_factory=True)
    return found


def help_text(command: str) -> str:
    """Return the text of ``--help-config``: the entries of a command's configuration."""
    lines = [f"entries of a configuration of {command}, in addition to the arguments of Lightning's Trainer", ""]
    for row in rows(COMMANDS[command]):
        default = {"required": "required", "-": "optional"}.get(row.default, f"default {row.default}")
        lines.append(f"{row.path}: {row.values}, {default}\n    {row.meaning}")
    return "\n".join(lines)


def markdown() -> str:
    """Return the text of docs/solo_options.md."""
    tables = {command: list(rows(model)) for command, model in COMMANDS.items()}
    lines = [
        "# Entries of a solo-learn configuration",
        "",
        "Generated by `python -m solo_ext.schema > docs/solo_options.md`; edit solo_ext/schema.py, not this file.",
        "",
        "The format is that of solo-learn's main branch. An entry that is not listed is an error, except for arguments",
        "of Lightning's `Trainer` at the top level, and entries that another one uses as `${NAME}`. In the column of",
        "defaults, - means that the entry is optional. `python -m solo_ext.main_pretrain --help-config` prints them.",
    ]
    for command, found in tables.items():
        lines += ["", f"## {command}", ""]
        if command == "main_linear":
            shared = set(tables["main_pretrain"])
            lines += ["In addition to the entries of main_pretrain marked ¹:", ""]
            found = [row for row in found if row not in shared]
        else:
            both = set(tables["main_linear"])
            found = [row._replace(path=row.path + ("¹" if row in both else "")) for row in found]
        lines += table(("entry", "values", "default", "meaning"), found)
    lines += [
        "",
        "¹ also an entry of main_linear.",
        "",
        "## Ignored entries",
        "",
        *table(("entry", "reason"), IGNORED.items()),
    ]
    lines += ["", "## Set by the commands", "", *table(("entry", "instead"), SET_BY_COMMANDS.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
