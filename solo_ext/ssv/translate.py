"""Translate a configuration of Self-Supervised-Vision to one of solo-learn's main branch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from plugins.tools.command import UserError
from plugins.tools.steps import GEOMETRIC, build_steps
from solo_ext.ssv.grammar import check

OUTPUTS = Path("outputs")
"""Folder of all runs, in the working directory."""
WIDTHS = {"resnet18": 512, "regnet_y_400mf": 440}
"""Widths of the features; those of the other networks are 2048, and that of vit is its ``hidden_dim``."""
SIDES = {"cifar10": 32, "cifar100": 32, "digits": 16}
"""Sides of the images of the data sets, in pixels."""
MOMENTUM = {"momentum": 0.9, "nesterov": True}
"""Of SGD, in all files."""
CLASSIFIER_LR = 0.1
"""Largest learning rate of the online classifier, which the original does not have. It changes no other weight."""

Document = Mapping[str, Any]
Steps = list[dict[str, Any]]


def run_folder(algo: str, arch: str, output: str) -> Path:
    """Return the folder of a run, ``outputs/<algo>/<arch>/<output>``; an absolute ``output`` is the folder itself."""
    return OUTPUTS / algo / arch / output


class Method(NamedTuple):
    """A method of ours, and its options.

    Args:
        name: of the method.
        options: its ``method_kwargs``.
        momentum: first and last momentum of the teacher; None if the method has none.
    """

    name: str
    options: dict[str, Any]
    momentum: tuple[float, float] | None = None


def translate(
    document: Document, algo: str, arch: str, *, output: str = "run", devices: int = 1, wandb: bool = False
) -> DictConfig:
    """Translate a configuration to that of a pre-training, which :func:`solo_ext.main_pretrain.pretrain` runs.

    The result is not yet checked by ``solo_ext.config.parse_pretrain``, which ``pretrain`` does.

    Args:
        document: the content of a YAML file of Self-Supervised-Vision, as plain values; it is not changed.
        algo: a key of ``solo_ext.ssv.grammar.ALGORITHMS``.
        arch: one of ``solo_ext.ssv.grammar.ARCHS``.
        output: name of the run's folder.
        devices: number of processes that share a batch.
        wandb: whether to log to Weights & Biases.

    Raises:
        UserError: an entry is missing, unknown or out of range; the message lists all errors.
    """
    document = check(document, algo)
    if _OWNERS.get(arch, algo) != algo:
        raise UserError(f"--arch {arch} is only available with --algo {_OWNERS[arch]}; choose another network")
    data, folder = document["data"], run_folder(algo, arch, output)
    if data["batch_size"] % devices:
        raise UserError(f"data.batch_size must be a multiple of --devices {devices}, got {data['batch_size']}")
    backbone, width = _backbone(document["encoder"], arch)
    method = METHODS[algo](document, width)
    views = _VIEWS.get(algo, _two_views)(document)
    _try_out(views["augmentations"], data["dataset_name"])
    cfg: dict[str, Any] = {
        "name": algo,
        "method": method.name,
        "method_kwargs": method.options,
        "backbone": backbone,
        "data": {**_paths(data), "num_workers": data["num_workers"], "drop_last": False},
        **views,
        "optimizer": _optimizer(document, devices),
        "scheduler": _scheduler(document["scheduler"]),
        "max_epochs": document["epochs"],
        "check_val_every_n_epoch": document["eval_every"],
        "seed": document["seed"],
        "precision": 32,
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "sync_batchnorm": devices > 1,
        "checkpoint": {"dir": str(folder.parent.parent), "group": folder.parent.name, "version": folder.name},
        "auto_resume": {"enabled": True, "max_hours": 10**6},
        "wandb": {"enabled": wandb, **document["wandb"]},
    }
    if method.momentum is not None:
        cfg["momentum"] = dict(zip(("base_tau", "final_tau"), method.momentum, strict=True))
    if document.get("gradient_clip") is not None:  # of each element
        cfg |= {"gradient_clip_val": document["gradient_clip"], "gradient_clip_algorithm": "value"}
    return OmegaConf.create(cfg)


_OWNERS = {"vit": "dino", "regnet_y_400mf": "seer"}


def _backbone(encoder: Document, arch: str) -> tuple[dict[str, Any], int]:
    """Return the entry ``backbone``, and the width of its features."""
    if arch == "vit":
        kwargs = {
            key: value for key, value in encoder.items() if key not in ("reduce_bottom_conv", "zero_init_residual")
        }
        return {"name": "ssv_vit", "kwargs": kwargs}, encoder["hidden_dim"]
    if arch == "regnet_y_400mf":
        return {"name": arch, "kwargs": {"stem": "3x3"}}, WIDTHS[arch]
    kwargs = {"stem": "3x3" if encoder["reduce_bottom_conv"] else "7x7"}
    if encoder["zero_init_residual"]:
        kwargs["zero_init_residual"] = True
    return {"name": arch, "kwargs": kwargs}, WIDTHS.get(arch, 2048)


def _paths(data: Document) -> dict[str, Any]:
    """Return the data set and the folders of its images; ``root`` may be the folder of the splits of the digits."""
    root = Path(data["root"])
    paths = {"train_path": root / "train", "val_path": root / "val"}
    if data["dataset_name"] != "digits" or not all(path.is_dir() for path in paths.values()):
        paths = dict.fromkeys(paths, root)
    return {"dataset": data["dataset_name"], **{key: str(path) for key, path in paths.items()}}


def _optimizer(document: Document, devices: int) -> dict[str, Any]:
    given, batch = document["optimizer"], document["data"]["batch_size"]
    per_256 = 256 / batch  # the learning rates are multiplied by batch / 256
    betas = {"eps": given["epsilon"], "amsgrad": given["amsgrad"], "betas": given["betas"]}
    entry = {
        "name": given["name"],
        "batch_size": batch // devices,
        "lr": given["lr"] * per_256,
        "classifier_lr": min(given["lr"], CLASSIFIER_LR) * per_256,
        "weight_decay": document.get("weight_decay_lower", given["weight_decay"]),
        "kwargs": MOMENTUM if given["name"] == "sgd" else betas,
    }
    if "weight_decay_upper" in document:
        entry["final_weight_decay"] = document["weight_decay_upper"]
    return entry


def _scheduler(given: Document) -> dict[str, Any]:
    decay = {"multistep": "step", None: "none"}.get(given["name"], given["name"])
    entry = {"name": "ssv", "decay": decay, "warmup_epochs": given["warmup_epochs"]}
    if decay == "step":
        entry |= {"lr_decay_steps": given["milestones"], "lr_decay_factor": given["gamma"]}
    return entry


# views


def _two_views(document: Document) -> dict[str, Any]:
    return {"augmentations": [_view(document, document["data"]["transforms"], ("train", "test"), crops=2)]}


def _one_view(document: Document) -> dict[str, Any]:
    transforms = document["data"]["transforms"]
    names = ("aug", "std") if "aug" in transforms else ("train", "test")
    return {"augmentations": [_view(document, transforms, names, crops=1)]}


def _pirl_views(document: Document) -> dict[str, Any]:
    """Return an image and a stack of its cells, which are cut after all changes of the image."""
    view = _view(document, document["data"]["transforms"], ("train", "test"), crops=1)
    steps, side, cell = view["steps"], view["crop_size"], document["patch_size"]
    count = side // cell
    if side % cell or count**2 != document["num_patches"]:
        raise UserError(
            f"num_patches must be the square of image side / patch_size: {side} pixels and patches of {cell} pixels "
            f"make {count} x {count} patches, got num_patches {document['num_patches']}"
        )
    names = [next(iter(step)) for step in steps]
    cut = names.index("to_tensor") if "to_tensor" in names else len(names)  # what follows acts on each pixel by itself
    stack = {"steps": steps[:cut], "patch_steps": steps[cut:], "jigsaw": {"side": side, "grid": count}}
    return {"augmentations": [view, {**stack, "crop_size": cell, "num_crops": 1}]}


def _cpc_views(document: Document) -> dict[str, Any]:
    """Return a stack: geometric steps change the image, all others each patch."""
    view = _view(document, document["data"]["transforms"], ("train", "test"), crops=1)
    whole = [step for step in view["steps"] if next(iter(step)) in GEOMETRIC]
    grid = {"side": view["crop_size"], "stride": document["stride"]}
    return {
        "augmentations": [
            {
                "steps": whole,
                "patch_steps": [step for step in view["steps"] if step not in whole],
                "grid": grid,
                "crop_size": document["patch_size"],
                "num_crops": 1,
                "eval_steps": view["eval_steps"],
            }
        ]
    }


def _amdim_views(document: Document) -> dict[str, Any]:
    """Return two views with one flip for both."""
    entry = _two_views(document)
    steps = entry["augmentations"][0]["steps"]
    for step in [step for step in steps if "random_flip" in step]:
        entry["shared_flip"] = (step["random_flip"] or {}).get("p", 0.5)
        steps.remove(step)
    return entry


def _multicrop_views(document: Document) -> dict[str, Any]:
    """Return large views and small crops; each is cut from the image by the crop of the list, with its own size."""
    given = document["data"]["multicrop_config"]
    share = given["scale_threshold"]
    views = []
    for kind, scale in (("global", [share, 1.0]), ("local", [0.08, share])):
        crop = {"size": given[f"{kind}_size"], "scale": scale, "interpolation": "bicubic"}
        train = dict(given["train_transforms"])
        if "random_resized_crop" in train:
            train["random_resized_crop"] = crop
        else:
            train = {"random_resized_crop": crop, **train}
        names = {"train": train, "test": given["test_transforms"]}
        if count := given[f"num_{kind}_views"]:
            views.append(_view(document, names, ("train", "test"), crops=count))
    for view in views[1:]:
        del view["eval_steps"]
    return {"augmentations": views}


_VIEWS: Mapping[str, Callable[[Document], dict[str, Any]]] = {
    **dict.fromkeys(("sela", "deep_cluster"), _one_view),
    **dict.fromkeys(("dino", "seer"), _multicrop_views),
    "pirl": _pirl_views,
    "cpc": _cpc_views,
    "amdim": _amdim_views,
}


def _view(document: Document, transforms: Document, names: tuple[str, str], *, crops: int) -> dict[str, Any]:
    """Return an entry of ``augmentations``: the transforms of training and of evaluation in the order of the file."""
    steps, evaluation = ([{name: options} for name, options in transforms[key].items()] for key in names)
    side = image_side(steps, document["data"]["dataset_name"])
    return {"steps": steps, "eval_steps": evaluation, "crop_size": side, "num_crops": crops}


def _try_out(views: list[dict[str, Any]], dataset: str) -> None:
    """Apply the transforms to a black image of the data set's size.

    Raises:
        UserError: a crop is larger than the image, or evaluation makes no tensor.
    """
    side = SIDES[dataset]
    for view in views:
        for name in ("steps", "eval_steps"):
            try:
                image = build_steps(view.get(name) or ())(Image.new("RGB", (side, side)))
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"data: the transforms do not fit images of {side} x {side} pixels: {error}") from None
            if view.get(name) and "patch_steps" not in view and not isinstance(image, Tensor):
                raise UserError("data: the transforms do not end in tensors; add to_tensor")


def image_side(steps: Steps, dataset: str) -> int:
    """Return the side of the images that a list of transforms makes, in pixels.

    Raises:
        UserError: they are not square.
    """
    side: Any = SIDES[dataset]
    for step in steps:
        ((name, options),) = step.items()
        if name in GEOMETRIC and "size" in (options or {}):
            side = options["size"]
            if isinstance(side, list):
                if len({*side}) != 1:
                    raise UserError(f"{name}.size must be one number, or two that are equal, got {side}")
                (side,) = {*side}
    return side


# methods


def _teacher(document: Document) -> tuple[float, float]:
    return document.get("tau_lower", document["tau"]), document["tau_upper"]


def _predicting(document: Document, width: int) -> dict[str, Any]:
    """Return the widths of the heads of BYOL and ReLIC: the hidden layers are as wide as their input."""
    dim = document["proj_dim"]
    return {"proj_hidden_dim": width, "proj_output_dim": dim, "pred_hidden_dim": dim}


def _simclr(document: Document, width: int) -> Method:
    widths = {"proj_hidden_dim": width, "proj_output_dim": document["proj_dim"]}
    return Method("simclr", {"head": "ssv", **widths, "temperature": document["loss_fn"]["temperature"]})


def _moco(document: Document, width: int) -> Method:
    options = {
        "head": "linear",
        "proj_output_dim": document["proj_dim"],
        "queue_size": document["queue_size"],
        "temperature": document["loss_fn"]["temperature"],
    }
    return Method("moco", options, (document["momentum"],) * 2)


def _byol(document: Document, width: int) -> Method:
    scale = {"scale_loss": 1 / document["proj_dim"]}  # the original's loss is the mean over the columns
    return Method("byol", {**_predicting(document, width), **scale}, _teacher(document))


def _relic(document: Document, width: int) -> Method:
    loss = {key: document["loss_fn"][key] for key in ("temperature", "alpha")}
    return Method("relic", {**_predicting(document, width), **loss}, _teacher(document))


def _dino(document: Document, width: int) -> Method:
    options = {
        "head": "ssv",
        "proj_hidden_dim": document["proj_head"]["hidden_dim"],
        "num_prototypes": document["proj_head"]["proj_dim"],
        "student_temperature": document["student_temp"],
        "warmup_teacher_temperature": document["teacher_temp_lower"],
        "teacher_temperature": document["teacher_temp_upper"],
        "warmup_teacher_temperature_epochs": document["temp_warmup_epochs"],
        "center_momentum": document["center_momentum"],
        "freeze_last_layer": 0,
    }
    return Method("dino", options, (document["lambda_lower"], document["lambda_upper"]))


def _pirl(document: Document, width: int) -> Method:
    options = {
        "head": "linear",
        "proj_output_dim": document["proj_dim"],
        "patches": document["num_patches"],
        "num_negatives": document["num_negatives"],
        "bank_momentum": document["momentum"],
        "temperature": document["loss_fn"]["temperature"],
        "patch_weight": document["loss_fn"]["loss_weight"],
    }
    return Method("pirl", options)


def _barlow(document: Document, width: int) -> Method:
    dim = document["proj_dim"]
    widths = {"head": "ssv", "proj_hidden_dim": dim, "proj_output_dim": dim}
    return Method("barlow_twins", {**widths, "lambd": document["loss_fn"]["off_diagonal_weight"]})


def _simsiam(document: Document, width: int) -> Method:
    dim = document["proj_dim"]
    options = {
        "head": "ssv",
        "proj_hidden_dim": dim,
        "proj_output_dim": dim,
        "pred_hidden_dim": document["bottleneck_dim"],
        "pred_lr_constant": False,
    }
    return Method("simsiam", options)


def _deep_cluster(document: Document, width: int) -> Method:
    options = {
        "head": "ssv",
        "num_clusters": document["num_classes"],
        "pca_dim": 0,
        "kmeans_iterations": 300,
        "balance": "none",
    }
    return Method("deepcluster", options)


def _clustering(document: Document) -> dict[str, Any]:
    loss = document["loss_fn"]
    return {
        "proj_hidden_dim": document["hidden_dim"],
        "proj_output_dim": document["proj_dim"],
        "num_prototypes": document["prototype_size"],
        "temperature": loss["temperature"],
        "epsilon": loss["sinkhorn_eps"],
        "iterations": loss["sinkhorn_iters"],
    }


def _swav(document: Document, width: int) -> Method:
    batch, bank = document["data"]["batch_size"], document["feature_bank_size"]
    options = {
        "head": "ssv",
        **_clustering(document),
        "free_prototypes": True,
        "queue_size": bank,
        "queue_epoch": 0,
        "freeze_prototypes_steps": 0,
        "scale_loss": batch / (batch + bank),  # the original's mean is over the rows of the bank too
    }
    return Method("swav", options)


def _sela(document: Document, width: int) -> Method:
    updates, heads = document["self_label_iters"], document["num_cluster_heads"]
    options = {
        "n_clusters": document["num_clusters"],
        "n_heads": heads,
        "lamb": document["lambda"],
        "label_updates": updates,
        "label_spacing": "square",
        "max_iter": max(updates, 1000),
        "scale_loss": float(heads),  # the original's loss is the sum over the heads
    }
    return Method("sela", options)


def _amdim(document: Document, width: int) -> Method:
    (fine, coarse), sizes = document["taps"], document["tap_sizes"]
    maps = {"fine_map": fine, "coarse_map": coarse, "fine_size": sizes[0], "coarse_size": sizes[1]}
    return Method("amdim", {"proj_output_dim": document["n_rkhs"], **maps})


def _cpc(document: Document, width: int) -> Method:
    side = image_side(
        [{name: options} for name, options in document["data"]["transforms"]["train"].items()],
        document["data"]["dataset_name"],
    )
    patch, stride = document["patch_size"], document["stride"]
    options = {
        "proj_output_dim": document["proj_dim"],
        "grid": max(side - patch, 0) // stride + 1,
        "patch": patch,
        "stride": stride,
        "directions": document["directions"],
        "norm": "per_sample",
    }
    return Method("cpc", options)


def _seer(document: Document, width: int) -> Method:
    return Method("seer", _clustering(document))


METHODS: Mapping[str, Callable[[Document, int], Method]] = {
    "simclr": _simclr,
    "moco": _moco,
    "byol": _byol,
    "dino": _dino,
    "pirl": _pirl,
    "barlow": _barlow,
    "simsiam": _simsiam,
    "relic": _relic,
    "deep_cluster": _deep_cluster,
    "swav": _swav,
    "sela": _sela,
    "amdim": _amdim,
    "cpc": _cpc,
    "seer": _seer,
}
"""Algorithm → function from its configuration and the width of the features to our method."""
