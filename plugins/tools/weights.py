"""Published DISSL weights, and files of their format.

The authors of arXiv:2209.06235 publish ResNet-50 trunks trained on ImageNet as files of torch.save: a flat dictionary
under torchvision's names, without classifier, whose ``resizer.*`` are the block that widens the representation (318
tensors for 2048 dimensions, 336 for 8192)::

    model = load_dissl("dissl_resnet50_d8192_e400_m6")  # downloads once
    model = load_dissl("checkpoints/model_final_checkpoint_phase99.torch")  # a checkpoint of VISSL, or a local copy

``python -m plugins.tools.export CKPT --to dissl OUT`` makes such a file of a checkpoint.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from plugins.heads import expand_resnet_dim
from plugins.tools.command import UserError
from plugins.tools.fitting import differences, plain_names

RELEASE = "https://github.com/YannDubs/Invariant-Self-Supervised-Learning/releases/download/v1.0.0-alpha"
NAMES = (
    "dissl_resnet50_dNone_e100_m2",
    "dissl_resnet50_d8192_e100_m2",
    "dissl_resnet50_d8192_e100_m6",
    "dissl_resnet50_dNone_e400_m2",
    "dissl_resnet50_dNone_e400_m6",
    "dissl_resnet50_d8192_e400_m6",
    "dissl_resnet50_d8192_e800_m8",
)
"""Width of the representation (None: 2048), epochs, number of crops."""
ARCHITECTURES = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")
_FILE_BLOCK, _MODEL_BLOCK = "resizer.", "avgpool.0."


def load_dissl(source: str | Path, *, sha256: str | None = None) -> nn.Module:
    """A torchvision ResNet with the weights of a file; it returns representations.

    Args:
        source: one of NAMES, or the path of a file: the published flat dictionary, a whole checkpoint of VISSL, or a
            dictionary under the prefixes ``trunk.`` or ``_feature_blocks.``.
        sha256: of the file, in hexadecimal. What is downloaded without it is remembered, in a file beside it, and must
            be the same later.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: no such file or name, no network, another sha256, not such a file, or weights that do not fit; all of
            them have to.
    """
    path = Path(source)
    if not path.is_file():
        if str(source) not in NAMES:
            raise UserError(f"there is no file {source}, and no weights of that name; there are {', '.join(NAMES)}")
        path = _downloaded(str(source), sha256)
    elif sha256 is not None:
        _check_digest(path, sha256)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is no file of weights that can be read: {reason}") from error
    return build(trunk_of(content, str(path)), str(path)).eval()


def dissl_resnet50(name: str, *, pretrained: bool = True, **options: Any) -> nn.Module:
    """The ResNet-50 of one of NAMES, with its published weights or untrained.

    Args:
        name: one of NAMES.
        pretrained: whether to load the weights; then the model is in evaluation mode.
        options: of torchvision's ``resnet50``, which must not change its tensors where weights are loaded.

    Raises:
        UserError: see ``load_dissl``.
    """
    if pretrained and not options:
        return load_dissl(name)
    import torchvision

    model = torchvision.models.resnet50(weights=None, **options)
    expand_resnet_dim(model, 2048 if "dNone" in name else 8192)
    if pretrained:
        model.load_state_dict(load_dissl(name).state_dict(), strict=True)
        model.eval()
    return model


def preprocessor() -> Any:
    """What an image goes through before any of these models: 256, the central 224, ImageNet's mean and deviation."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def trunk_of(content: Any, what: str) -> dict[str, Tensor]:
    """The backbone in what a file holds, under the published names.

    Raises:
        UserError: there is none.
    """
    if isinstance(content, Mapping) and "classy_state_dict" in content:
        content = vissl_parts(content, what)["trunk"]
    for key in ("model_state_dict", "state_dict"):
        if isinstance(content, Mapping) and key in content:
            content = content[key]
    every = content if isinstance(content, Mapping) else {}
    state = {key: value for key, value in every.items() if isinstance(key, str) and isinstance(value, Tensor)}
    state = plain_names(state)
    for prefix in ("module.", "trunk.", "base_model.", "_feature_blocks."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not any(key.startswith("conv1.") for key in state):
        raise UserError(f"{what} holds no ResNet: it has no conv1.weight")
    return published_names(state)


def vissl_parts(checkpoint: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Trunk and heads of a checkpoint of VISSL.

    Args:
        checkpoint: has a ``classy_state_dict``.
        what: names the file to the user.

    Raises:
        UserError: it has no trunk.
    """
    found, done = checkpoint["classy_state_dict"], []
    for key in ("base_model", "model", "trunk"):
        done.append(key)
        if not isinstance(found, Mapping) or not isinstance(found.get(key), Mapping):
            raise UserError(f"{what} is no whole checkpoint of VISSL: it has no {'.'.join(done)}")
        parts, found = found, found[key]
    return parts


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``avgpool.0.*`` of our model is ``resizer.*`` in a file."""
    return {
        _FILE_BLOCK + key.removeprefix(_MODEL_BLOCK) if key.startswith(_MODEL_BLOCK) else key: value
        for key, value in state.items()
    }


def build(state: Mapping[str, Tensor], what: str) -> nn.Module:
    """The ResNet that weights under published names fit in every tensor, with them loaded, in single precision.

    Raises:
        UserError: none does; what differs from the nearest is named. Weights are dense and of a floating-point type.
    """
    import torchvision

    differences = {}
    for arch in ARCHITECTURES:
        with torch.device("meta"):
            model = torchvision.models.get_model(arch, weights=None)
            model = _expanded(model, state.get(f"{_FILE_BLOCK}conv3.weight"))
        wanted = published_names(model.state_dict())
        if not (found := _difference(state, wanted)):
            model.load_state_dict(
                {key.replace(_FILE_BLOCK, _MODEL_BLOCK, 1) if key.startswith(_FILE_BLOCK) else key:
                 value.to(wanted[key].dtype) for key, value in state.items()}, strict=True, assign=True,
            )  # fmt: skip
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            return model
        differences[arch] = found
    arch, found = min(differences.items(), key=lambda item: sum(map(len, item[1].values())))
    words = "; ".join(f"{len(keys)} {kind}, first {keys[0]}" for kind, keys in found.items())
    raise UserError(f"{what} fits no ResNet of torchvision; with {arch}: {words}")


def _expanded(model: Any, last: Tensor | None) -> nn.Module:
    """With the block whose last convolution this is, where it can have it; without classifier."""
    model.fc = nn.Identity()
    if last is None or last.ndim != 4:
        return model
    try:
        return expand_resnet_dim(model, last.shape[0], bottleneck=last.shape[1])
    except ValueError:  # no multiple of this ResNet's width
        return model


def _difference(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    odd = [key for key in wanted if key in state and not _castable(state[key], wanted[key].dtype)]
    return {**differences(state, wanted), **({"of another kind": odd} if odd else {})}


def _castable(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is dense and there, and floating-point where that is wanted; counts may be of any type."""
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_complex():
        return False
    return value.is_floating_point() or not dtype.is_floating_point


def _downloaded(name: str, sha256: str | None) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.torch"
    record = path.with_name(f"{path.name}.sha256")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{RELEASE}/{path.name}"
        record.unlink(missing_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"cannot download {url} ({reason}); put the file at {path}, or give its path") from error
        except RuntimeError as error:
            raise UserError(f"{url} is not what was expected: {error}") from error
    recorded = record.read_text().strip() if record.is_file() else None
    digest = _check_digest(path, sha256 or recorded)
    if recorded is None:
        record.write_text(f"{digest}\n")
    return path


def _check_digest(path: Path, expected: str | None) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if expected is not None and digest != expected.lower():
        raise UserError(f"{path} has the sha256 {digest}, not {expected}; delete it if it is damaged")
    return digest


def _digest(file: Any) -> str:
    sha = hashlib.sha256()
    while piece := file.read(2**20):
        sha.update(piece)
    return sha.hexdigest()
