"""Export the backbone of a checkpoint::

    python -m plugins.tools.export CKPT --to torchvision|timm|detectron2|safetensors|dissl OUT

CKPT is a checkpoint of solo-learn (both generations), of lightly or any other LightningModule with a ``backbone``, of
VISSL, of the scripts of VICReg, SSL-EY, MEC and Matrix-SSL, or a state dict. ``torchvision`` and ``timm`` write a state
dict for the library's model without its classifier::

    model = torchvision.models.resnet18()
    model.fc = torch.nn.Identity()
    model.load_state_dict(torch.load("OUT", weights_only=True))

    timm.create_model("resnet18", num_classes=0).load_state_dict(torch.load("OUT", weights_only=True))

A wider ResNet is one of ``plugins.tools.backbones``, such as ``BACKBONES["resnet50x2"]()``; timm has none.

``detectron2`` writes the ``.pkl`` file for ``MODEL.WEIGHTS`` of detectron2. It accepts a ResNet-50 or deeper with the
stem for large images. configs/detectron2 has configurations that use the file.

Among VISSL's trunks, ResNet, RegNet and the vision transformer are in torchvision; ConvNeXt, the vision transformer,
XCiT and ConViT are in timm. Select their architecture with ``--arch``.

``safetensors`` writes the tensors of the backbone under the same names. ``dissl`` writes a ResNet, with or without an
expanded representation, to a file that :func:`plugins.tools.weights.load_dissl` reads. Tensors that do not belong to
the backbone are dropped, and the command prints their number. A missing or unexpected key, or one of another shape, is
an error, since a partially loaded backbone gives random features.
"""

import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from plugins.norms import fit_norms_
from plugins.sobel import BUFFER
from plugins.tools.backbones import BACKBONES, headless_backbone, without_classifier
from plugins.tools.command import Parser, UserError, exit_on_user_error, print_on_rank_zero
from plugins.tools.files import atomic
from plugins.tools.fitting import mismatch, plain_names
from plugins.tools.library_names import library_names
from plugins.tools.stems import KEY, Stem, fit_stem_, stem_of, stem_of_file, with_stem

_BACKBONES = ("backbone", "encoder", "student_backbone")
_WRAPPERS = r"(?:(?:module|model|student|online)\.)*"
_OTHERS = {"teacher", "student", "projector", "projection_head", "predictor", "prediction_head", "heads", "prototypes"}
"""Names of other parts of a method. A state dict with one of them is not that of a backbone alone."""
_PROJECTOR = "encoder.fc."
"""Prefix of the projector in the published scripts of MEC, Matrix-SSL, SimSiam and MoCo v3."""
_TRUNK = ("base_model.", "_feature_blocks.", "network.")
"""Prefixes of the names of a network in VISSL's trunks."""
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnet50x2", "resnet50x4", "resnet50x5", "resnet200", "resnet200x2"),
)
"""Networks to which weights are fitted without ``--arch``; the last five are of plugins.tools.backbones."""
_BOTTLENECKS = ("resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
_STAGES = {f"layer{stage}": f"res{stage + 1}" for stage in range(1, 5)}
TARGETS = ("torchvision", "timm", "detectron2", "safetensors", "dissl")


class Backbone(NamedTuple):
    """The weights of a backbone.

    Args:
        state: {name: tensor}; the names are those of torchvision if the backbone is one of its ResNets.
        dropped: number of other tensors in the checkpoint, by the first part of their names.
        stem: of the network, if its first convolution is 3×3; None if it is unknown.
    """

    state: dict[str, Tensor]
    dropped: Mapping[str, int]
    stem: Stem | None = None


def checkpoint_file(path: Path) -> Path:
    """Return the path of a checkpoint; if the path is the folder of a run, the newest checkpoint in it.

    Raises:
        UserError: the folder contains no checkpoint.
    """
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime) or [path / "checkpoint.torch"]
    if not found[-1].is_file():
        raise UserError(f"{path} contains no checkpoint, neither *.ckpt nor checkpoint.torch")
    return found[-1]


def read_backbone(path: Path) -> Backbone:
    """Read the backbone in a checkpoint of any of the frameworks, without running code in the file.

    Args:
        path: the file, or the folder of a run.

    Raises:
        UserError: there is no such file, it is not a checkpoint, or it contains no backbone.
    """
    from plugins.tools.unpickle import read_without_code
    from plugins.tools.weights import vissl_parts

    path = checkpoint_file(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    content = read_without_code(path)[0]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} is not a checkpoint: it contains a {type(content).__name__}")
    if "classy_state_dict" in content:
        parts = {part: _tensors(state) for part, state in vissl_parts(content, str(path)).items()}
        state = plain_names(parts.pop("trunk"))
        for prefix in _TRUNK:
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        dropped = Counter({part: len(tensors) for part, tensors in parts.items() if tensors})
    else:
        nested = (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping))
        every = _tensors(next(nested, content))
        script = bool(every) and all(key.startswith("module.") for key in every)
        every = plain_names(every)
        prefix = _prefix(every, path)
        ours = {key for key in every if key.startswith(prefix) and not (script and key.startswith(_PROJECTOR))}
        state = plain_names({key.removeprefix(prefix): value for key, value in every.items() if key in ours})
        dropped = Counter(key.removeprefix("module.").split(".")[0] for key in every if key not in ours)
    if not state:
        raise UserError(f"{path} contains no backbone: it has no tensors")
    if sparse := next((key for key, value in state.items() if value.layout != torch.strided), None):
        raise UserError(f"{path}: {sparse} is a sparse tensor, but the weights of a backbone must be dense")
    if {key.split(".")[0] for key in state} - {"8"} == set(_CHILDREN):  # nn.Sequential(*list(resnet.children())[:-1])
        names = {**_CHILDREN, "8": "avgpool"}  # with an expanded representation, the average pooling has weights
        state = {f"{names[(parts := key.partition('.'))[0]]}.{parts[2]}": value for key, value in state.items()}
    return Backbone(state, dict(sorted(dropped.items())), stem_of_file(content, state))


def _prefix(state: Mapping[str, Tensor], path: Path) -> str:
    """Return the prefix of the backbone's names; it is empty if the state dict is that of a backbone alone."""
    if "class_token" in state:  # in torchvision's transformers, "encoder" is the name of the blocks
        return ""
    for name in _BACKBONES:
        if found := {match[0] for key in state if (match := re.match(rf"{_WRAPPERS}{name}\.", key))}:
            return min(found, key=len)
    if "0.conv1.weight" in state:  # nn.Sequential(resnet, classifier), as VICReg's evaluate.py writes it
        return "0."
    parts = sorted({key.split(".")[0] for key in state})
    if _OTHERS & set(parts):
        raise UserError(
            f"{path} contains no backbone: none of its parts {', '.join(parts)} is named {' or '.join(_BACKBONES)}"
        )
    return ""


def fit(backbone: Backbone, target: str, arch: str | None, **options: Any) -> tuple[str, dict[str, Tensor], nn.Module]:
    """Load the weights of a backbone into a model of a library.

    Args:
        backbone: the weights, and the stem.
        target: "torchvision" or "timm".
        arch: name of the model in the library; None selects the ResNet that fits.
        options: of the model, if ``arch`` is given.

    Returns:
        The name of the model, the weights with the names of the library, and the model without its classifier. If the
        weights are those of a ResNet with a 3×3 convolution, the model has that stem; a stem that is unknown has
        padding 1 and no max-pool.

    Raises:
        UserError: there is no such model, it has no such option, or the weights do not fit it; the message names the
            differences.
    """
    state = library_names(backbone.state, target)
    if arch is None and options:
        raise UserError(f"the options {', '.join(options)} need an architecture; set arch too")
    if arch is None:
        for arch in _RESNETS:
            with torch.device("meta"):
                model = build_network("torchvision", arch)
            if not _differences(state, model):
                break
        else:
            keys = ", ".join(list(state)[:3])
            raise UserError(
                f"the backbone is not a ResNet (its keys start with {keys}); select its architecture with --arch, or "
                "export with --to safetensors"
            )
    model = build_network(target, arch, **options)
    if differences := _differences(state, model):
        raise UserError(f"the backbone is not a {arch} of {target}: {differences}")
    model.load_state_dict(state)
    return arch, state, fit_stem_(model, backbone.stem)


def build_network(target: str, arch: str, **options: Any) -> nn.Module:
    """Build an untrained network of "torchvision", this package included, or of "timm", without its classifier.

    Args:
        target: the library.
        arch: name of the network.
        options: of the network, such as ``zero_init_residual`` of a ResNet.

    Raises:
        UserError: there is no network of that name, or it has no such option or value.
    """
    try:
        if target == "timm":
            import timm

            if arch not in timm.list_models():
                raise UserError(f"timm has no model {arch!r}")
            return timm.create_model(arch, num_classes=0, **options)
        import torchvision

        if arch in BACKBONES:
            return headless_backbone(arch, **options)
        if arch in torchvision.models.list_models(module=torchvision.models):
            return without_classifier(torchvision.models.get_model(arch, weights=None, **options))
    except (TypeError, ValueError) as error:
        raise UserError(f"network {arch}: {error}") from None
    raise UserError(f"torchvision has no model {arch!r}; of ours there are {', '.join(BACKBONES)}")


def _differences(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Describe why the weights do not fit a model; before that, give it their normalisation and stem."""
    fit_norms_(model, state)
    stem, conv = state.get("conv1.weight"), dict(model.named_children()).get("conv1")
    if isinstance(stem, Tensor) and isinstance(conv, nn.Conv2d) and conv.kernel_size == (7, 7):
        width, channels = conv.weight.shape[:2]
        if stem.shape == (width, channels, 3, 3):
            model.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False, device=conv.weight.device)
            model.maxpool = nn.Identity()
    return mismatch(state, model.state_dict())


def to_detectron2(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Convert the weights of a ResNet to the format of detectron2.

    Args:
        state: state dict of a torchvision ResNet without its classifier.

    Returns:
        Arrays with detectron2's names, without the numbers of batches of the batch norms. With ``matching_heuristics``,
        detectron2 adds the prefixes ``backbone.`` and ``roi_heads.`` of its model to the names.

    >>> state = {"layer1.0.downsample.1.weight": torch.ones(1), "bn1.bias": torch.zeros(1)}
    >>> sorted(to_detectron2(state)["model"])
    ['res2.0.shortcut.norm.weight', 'stem.conv1.norm.bias']
    """
    model = {}
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            continue
        stage, _, rest = key.partition(".")
        name = f"{_STAGES[stage]}.{rest}" if stage in _STAGES else f"stem.{key}"
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        model[re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)] = value.float().numpy()
    return {"model": model, "__author__": "plugins.tools.export", "matching_heuristics": True}


def _has_statistics(state: Mapping[str, Tensor]) -> bool:
    """Return whether a backbone has batch norms with running statistics."""
    return any(name.endswith("running_mean") for name in state)


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        return {}
    return {key: value for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)}


def export(path: Path, target: str, out: Path, arch: str | None = None) -> str:
    """Write the backbone of a checkpoint to a file.

    Args:
        path: the checkpoint.
        target: one of TARGETS.
        out: the file, which is written atomically.
        arch: name of the model in torchvision or timm; None selects the ResNet that fits.

    Returns:
        A line for the user that describes the written and the dropped tensors.

    Raises:
        UserError: see ``read_backbone`` and ``fit``.
    """
    if out.is_dir():
        raise UserError(f"OUT must be a file, got the folder {out}")
    backbone = read_backbone(path)
    # tensors of a checkpoint may share memory: safetensors rejects them, and torch.save would write all of the memory
    state = {key: value.clone().contiguous() for key, value in backbone.state.items()}
    what, stem = f"{len(state)} tensors", backbone.stem
    if target != "safetensors" and any(key.rpartition(".")[2] == BUFFER for key in state):
        raise UserError(
            f"{path} has a Sobel filter before its first convolution, which no model of {target} has; export it with "
            "--to safetensors, and load it into plugins.sobel.sobel_(model)"
        )
    if target == "dissl":
        from plugins.tools.weights import backbone_weights, build, published_names

        state = backbone_weights({key: value for key, value in state.items() if not key.startswith("fc.")}, str(path))
        state = published_names(build(state, str(path)).state_dict())
        what = f"the format of DISSL's weights, {len(state)} tensors"
    elif target != "safetensors" or arch is not None:
        library = "timm" if target == "timm" else "torchvision"
        arch, state, network = fit(backbone._replace(state=state), library, arch)
        what, stem = f"{arch} for {target}, {what}", stem_of(network)
        if any(".attn." in key or ".self_attention." in key for key in state):
            what += (
                "; the weights do not determine the number of attention heads: create the model with the same number"
            )
        if any(key.endswith("gating_param") for key in state):
            what += "; create the model with norm_layer=torch.nn.LayerNorm, as in VISSL"
        if arch in _RESNETS and not _has_statistics(state):
            what += (
                "; its images were normalised by themselves: the model needs "
                "norm_layer=lambda width: torch.nn.GroupNorm(1, width)"
            )
        if arch in _RESNETS and state["conv1.weight"].shape[-1] == 3:
            assert stem is not None
            what += (
                ", with the stem for small images: the model needs a 3x3 conv1 with stride 1 and padding "
                f"{stem.padding}, and {'a' if stem.pool else 'no'} maxpool"
            )
    if target == "detectron2":
        if out.suffix != ".pkl":
            raise UserError(f"OUT must end in .pkl, by which detectron2 recognises the format, got {out}")
        if arch not in _BOTTLENECKS or state["conv1.weight"].shape[-1] == 3:
            small = " with a 3x3 conv1" if state["conv1.weight"].shape[-1] == 3 else ""
            raise UserError(f"detectron2 needs {', '.join(_BOTTLENECKS)} with a 7x7 conv1, got {arch}{small}")
        if not _has_statistics(state):
            raise UserError("detectron2's ResNets have batch norms, but the backbone was trained with norm=per_sample")
    with atomic(out) as file:
        if target == "safetensors":
            from safetensors.torch import save

            file.write(save(state, None if stem is None else {KEY: json.dumps(stem._asdict())}))
        elif target == "detectron2":
            pickle.dump(to_detectron2(state), file)
        else:
            torch.save(with_stem(state, stem), file)
    dropped = ", ".join(f"{name} ({count})" for name, count in backbone.dropped.items()) or "none"
    return f"{out}: {what}; dropped: {dropped}"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    with exit_on_user_error():
        parser = Parser("python -m plugins.tools.export", description="Exports the backbone of a checkpoint.")
        parser.add_argument(
            "checkpoint",
            type=Path,
            metavar="CKPT",
            help="checkpoint of solo-learn, lightly or VISSL, or folder of a run",
        )
        parser.add_argument("--to", required=True, choices=TARGETS)
        parser.add_argument("out", type=Path, metavar="OUT", help="the file to write")
        parser.add_argument(
            "--arch", metavar="NAME", help="name of the model in the library; default: the ResNet that fits"
        )
        args = parser.parse_args(arguments)
        print_on_rank_zero(export(args.checkpoint, args.to, args.out, args.arch))


if __name__ == "__main__":
    sys.exit(main())
