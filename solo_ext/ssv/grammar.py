"""The grammar of the YAML files of Self-Supervised-Vision: a schema for each algorithm.

:func:`check` validates a file. The original reads no other entries, and ignores them without a word; here they are
errors. ``seed`` and ``data.num_workers`` are additions, with the original's constants as defaults, and so are the
algorithms amdim, cpc and seer, which the original's table names but its code does not have.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from plugins.tools.schema import (
    SECTION,
    Allowed,
    Boolean,
    Fraction,
    NonNegative,
    PathString,
    Section,
    String,
    entry,
    integer,
    real_number,
)
from solo_ext.schema import validate

Positive = real_number("a number above 0", gt=0)
_Size = Annotated[
    list[Annotated[int, Field(ge=1)]],
    BeforeValidator(lambda size: [size, size] if type(size) is int else size),
    Field(min_length=2, max_length=2),
    Allowed("a side, or height and width, in pixels"),
]


def _pipeline(value: Any) -> Any:
    """Check a mapping of transforms by building them."""
    from plugins.tools.steps import build_steps  # torchvision is needed only here

    if not isinstance(value, Mapping) or not value:
        raise ValueError(f" must be a mapping of transforms to their options, got {value!r}")
    try:
        build_steps({name: options} for name, options in value.items())
    except ValueError as error:
        raise ValueError(f": {error}") from None
    return dict(value)


_Pipeline = Annotated[
    dict[str, Any], BeforeValidator(_pipeline), Allowed("a mapping of transforms to their options, in their order")
]


class Views(Section):
    """The transforms of most algorithms."""

    train: _Pipeline = entry("transforms of the views of training, in this order")
    test: _Pipeline = entry("transforms of the images of evaluation, in this order")


class Labelled(Section):
    """The transforms of SeLa."""

    aug: _Pipeline = entry("transforms of the images of training")
    std: _Pipeline = entry("transforms of the images that are labelled or evaluated")


class MultiCrop(Section):
    """The views of DINO and SEER."""

    num_local_views: integer(0) = entry("number of small crops", 6)
    num_global_views: integer(1) = entry("number of large views", 2)
    global_size: _Size = entry("size of the large views")
    local_size: _Size = entry("size of the small crops")
    scale_threshold: real_number("in [0.08, 1]", ge=0.08, le=1) = entry(
        "smallest share of the image's area in a large view, and largest share in a small crop", 0.3
    )
    train_transforms: _Pipeline = entry("transforms of all views; the size and scale of its crop are those of the view")
    test_transforms: _Pipeline = entry("transforms of the images of evaluation")


class _Data(Section):
    """The images."""

    dataset_name: Literal["cifar10", "cifar100", "digits"] = entry("data set; digits is for trials")
    root: PathString = entry("folder of the images; CIFAR is downloaded into it")
    batch_size: integer(2) = entry("images of a batch, on all devices together")
    num_workers: integer(0, 1024) = entry("processes that read images", 4)


class Data(_Data):
    """The images of most algorithms."""

    transforms: Views = entry("the transforms")


class LabelledData(_Data):
    """The images of SeLa."""

    transforms: Labelled = entry("the transforms")


class MultiCropData(_Data):
    """The images of DINO and SEER."""

    multicrop_config: MultiCrop = entry("the views")


class Encoder(Section):
    """Options of a ResNet."""

    reduce_bottom_conv: Boolean = entry("whether its first layer is a 3x3 convolution with stride 1", False)
    zero_init_residual: Boolean = entry("whether each block starts as the identity", False)


class ViTEncoder(Section):
    """Options of the vision transformer, or of a ResNet in its place."""

    hidden_dim: integer(1) = entry("width of the tokens", 384)
    embedding_dim: integer(1) = entry("width of the position embeddings", 192)
    intermediate_dim: integer(1) = entry("width of the hidden layers of the MLPs", 768)
    num_attention_heads: integer(1) = entry("attention heads", 6)
    patch_size: integer(1) = entry("side of a patch in pixels", 4)
    num_local_patches: integer(1) = entry("patches of a small crop", 4)
    num_global_patches: integer(1) = entry("patches of a large view", 64)
    num_encoder_layers: integer(1) = entry("blocks", 6)
    reduce_bottom_conv: Boolean = entry("of a ResNet: as for the other algorithms", True)
    zero_init_residual: Boolean = entry("of a ResNet: as for the other algorithms", False)


class Optimizer(Section):
    """The optimiser."""

    name: Literal["sgd", "adam", "adamw"] = entry("optimiser", "sgd")
    lr: Positive = entry("learning rate")
    weight_decay: NonNegative = entry("weight decay of all parameters")
    momentum: Any = entry("ignored, as in the original: SGD has momentum 0.9", optional=True)
    nesterov: Any = entry("ignored, as in the original: SGD has Nesterov's momentum", optional=True)
    epsilon: Positive = entry("adam, adamw: ε", 1e-6)
    amsgrad: Boolean = entry("adam, adamw: AMSGrad", False)
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2), Allowed("two numbers in [0, 1]")] = entry(
        "adam, adamw: β", [0.9, 0.999]
    )


class Scheduler(Section):
    """The schedule of the learning rate, which changes after each epoch."""

    name: Literal["cosine", "multistep"] | None = entry("decay after the warm-up", None)
    warmup_epochs: integer(0) = entry("epochs of warm-up", 0)
    milestones: Annotated[list[Annotated[int, Field(ge=1)]], Allowed("a list of epochs")] = entry(
        "multistep: epochs after the warm-up", optional=True
    )
    gamma: real_number("above 0, at most 1", gt=0, le=1) = entry("multistep: factor at each of them", 0.1)

    @model_validator(mode="after")
    def _check(self) -> "Scheduler":
        if self.name == "multistep" and not self.milestones:
            raise ValueError(".milestones must be a list of epochs with name: multistep, got none")
        return self


class LinearEval(Section):
    """The linear classifier after the training."""

    epochs: integer(1) = entry("epochs", 100)
    batch_size: integer(1) = entry("batch size", 256)
    lr: Positive = entry("learning rate", 0.1)
    input_dim: Any = entry("ignored: the width is that of the features", optional=True)


class Wandb(Section):
    """Weights & Biases, only with --wandb."""

    project: String = entry("project", "self-supervised-vision")
    entity: String = entry("account", optional=True)


class File(Section):
    """The entries of all algorithms."""

    epochs: integer(1, 10**9) = entry("epochs")
    eval_every: integer(1) = entry("epochs between evaluations")
    seed: integer(0, 2**32 - 1) = entry("seed of all random numbers", 420)
    data: Data = entry("the images")
    encoder: Encoder = entry("options of the network", Encoder())
    optimizer: Optimizer = entry("the optimiser")
    scheduler: Scheduler = entry("the schedule of the learning rate", Scheduler())
    linear_eval: LinearEval = entry("the linear classifier after the training", LinearEval())
    wandb: Wandb = entry("Weights & Biases", Wandb())


def _always(value: Any) -> Any:
    if value is not True:
        raise ValueError(f" must be true: the loss compares rows of unit length, got {value!r}")
    return value


_Normalize = Annotated[Any, BeforeValidator(_always), Allowed("true")]
_Width = integer(1)
_ProjDim = (_Width, entry("width of the embedding"))
_Temperature = real_number("at least 1e-06", ge=1e-6)


def _section(name: str, **fields: Any) -> Any:
    section = create_model(name, __base__=Section, **fields)
    return section, entry("the loss")


def _loss(**fields: Any) -> Any:
    """Return the section ``loss_fn`` of a loss of unit rows."""
    unit = (_Normalize, entry("whether rows are normalised", True))
    temperature = (_Temperature, entry("temperature of the softmax"))
    return _section("Loss", normalize=unit, temperature=temperature, **fields)


def _algorithm(name: str, **fields: Any) -> type[File]:
    return create_model(name, __base__=File, **fields)


_TAU = {
    "tau": (Fraction, entry("first momentum of the teacher; the last one is 1", 0.996)),
    "tau_lower": (Fraction, entry("the same, in place of tau", optional=True)),
    "tau_upper": (Fraction, entry("last momentum of the teacher", 1.0)),
}
_CLUSTERING = {
    "hidden_dim": (_Width, entry("width of the hidden layers of the head")),
    "proj_dim": _ProjDim,
    "prototype_size": (integer(2), entry("number of prototypes")),
}
_SINKHORN = _section(
    "Loss",
    temperature=(_Temperature, entry("temperature of the predictions", 0.1)),
    sinkhorn_eps=(_Temperature, entry("temperature of the codes", 0.05)),
    sinkhorn_iters=(integer(1), entry("iterations of the codes", 3)),
)

ALGORITHMS: dict[str, type[File]] = {
    "simclr": _algorithm("SimCLR", proj_dim=_ProjDim, loss_fn=_loss()),
    "moco": _algorithm(
        "MoCo",
        proj_dim=_ProjDim,
        momentum=(Fraction, entry("momentum of the teacher")),
        queue_size=(integer(1), entry("keys of the queue")),
        loss_fn=_loss(),
    ),
    "byol": _algorithm("BYOL", proj_dim=_ProjDim, **_TAU),
    "dino": _algorithm(
        "DINO",
        teacher_temp_lower=(_Temperature, entry("temperature of the assignments in the first epoch", 0.04)),
        teacher_temp_upper=(_Temperature, entry("the same after its warm-up", 0.07)),
        temp_warmup_epochs=(integer(0), entry("epochs of that warm-up", 30)),
        student_temp=(_Temperature, entry("temperature of the predictions", 0.1)),
        center_momentum=(Fraction, entry("share of the centre that is kept per step", 0.9)),
        weight_decay_lower=(Positive, entry("weight decay in the first epoch, in place of optimizer's", 0.04)),
        weight_decay_upper=(Positive, entry("weight decay at the end", 0.4)),
        lambda_lower=(Fraction, entry("first momentum of the teacher", 0.996)),
        lambda_upper=(Fraction, entry("last momentum of the teacher", 1.0)),
        gradient_clip=(Positive, entry("largest absolute element of a gradient; default: none", optional=True)),
        data=(MultiCropData, entry("the images")),
        encoder=(ViTEncoder, entry("options of the network", ViTEncoder())),
        proj_head=_section(
            "Head",
            hidden_dim=(_Width, entry("width of the hidden layers", 512)),
            proj_dim=(integer(2), entry("number of prototypes", 1024)),
        ),
    ),
    "pirl": _algorithm(
        "PIRL",
        proj_dim=_ProjDim,
        momentum=(Fraction, entry("share of the old row in an update of the memory")),
        patch_size=(integer(1), entry("side of a patch in pixels")),
        num_patches=(integer(1), entry("patches of an image, a square number")),
        num_negatives=(integer(1), entry("negatives of an image")),
        loss_fn=_loss(loss_weight=(Fraction, entry("weight of the patches' term"))),
    ),
    "barlow": _algorithm(
        "Barlow",
        proj_dim=_ProjDim,
        loss_fn=_section(
            "Loss",
            normalize=(Boolean, entry("accepted and without effect: the head normalises the rows", False)),
            off_diagonal_weight=(NonNegative, entry("weight of the off-diagonal terms")),
        ),
    ),
    "simsiam": _algorithm(
        "SimSiam", proj_dim=_ProjDim, bottleneck_dim=(_Width, entry("width of the predictor's hidden layer"))
    ),
    "relic": _algorithm(
        "ReLIC", proj_dim=_ProjDim, **_TAU, loss_fn=_loss(alpha=(NonNegative, entry("weight of the invariance")))
    ),
    "deep_cluster": _algorithm(
        "DeepCluster",
        num_classes=(integer(2), entry("number of clusters")),
        loss_fn=(Annotated[dict[str, Any], Allowed(SECTION)], entry("accepted and ignored", {})),
    ),
    "swav": _algorithm(
        "SwAV",
        **_CLUSTERING,
        feature_bank_size=(integer(0), entry("earlier rows that take part in the codes")),
        loss_fn=_SINKHORN,
    ),
    "sela": _algorithm(
        "SeLa",
        num_clusters=(integer(2), entry("classes of each head")),
        num_cluster_heads=(integer(1), entry("heads")),
        self_label_iters=(integer(1), entry("updates of the labels, and least number of iterations of each")),
        data=(LabelledData, entry("the images")),
        **{"lambda": (Positive, entry("exponent of the probabilities"))},
    ),
    "amdim": _algorithm(
        "AMDIM",
        n_rkhs=(_Width, entry("width of the embeddings")),
        taps=(
            Annotated[list[String], Field(min_length=2, max_length=2), Allowed("two modules of the network")],
            entry("modules of the network whose maps are predicted, the finer one first", ["layer3", "layer4"]),
        ),
        tap_sizes=(
            Annotated[list[integer(0)], Field(min_length=2, max_length=2), Allowed("two sides")],
            entry("largest sides of these maps", [4, 2]),
        ),
    ),
    "cpc": _algorithm(
        "CPC",
        proj_dim=_ProjDim,
        patch_size=(integer(1), entry("side of a patch in pixels")),
        stride=(integer(1), entry("distance of neighbouring patches in pixels")),
        directions=(integer(1, 4), entry("directions of prediction: 1, 2 or 4")),
    ),
    "seer": _algorithm("SEER", **_CLUSTERING, data=(MultiCropData, entry("the images")), loss_fn=_SINKHORN),
}
"""Algorithm → schema of its file."""

ARCHS = ("resnet18", "resnet50", "resnext50", "resnext101", "wide_resnet50", "wide_resnet101", "vit", "regnet_y_400mf")
"""Values of ``--arch``. vit is dino's, regnet_y_400mf seer's."""
ADDED = ("amdim", "cpc", "seer")
"""Algorithms that the original does not have."""


def check(document: Any, algo: str) -> dict[str, Any]:
    """Validate the content of a YAML file, and fill in the defaults.

    Args:
        document: the content.
        algo: a key of ALGORITHMS.

    Raises:
        UserError: an entry is missing, unknown or out of range; the message lists all errors.
    """
    return validate(ALGORITHMS[algo], document)
