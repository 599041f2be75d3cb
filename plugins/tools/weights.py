"""Load the published DISSL weights, and files in their format.

The authors of arXiv:2209.06235 publish ResNet-50 trunks trained on ImageNet as files of torch.save. A file contains a
flat state dict with torchvision's names, without the classifier. The names ``resizer.*`` belong to the block that
changes the width of the representation (318 tensors for 2048 dimensions, 336 for 8192)::

    model = load_dissl("dissl_resnet50_d8192_e400_m6")  # downloaded once
    model = load_dissl("checkpoints/model_final_checkpoint_phase99.torch")  # a VISSL checkpoint or a local copy

``python -m plugins.tools.export CKPT --to dissl OUT`` converts a checkpoint to such a file.
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
"""Published weights. The parts of a name are: width of the representation (None: 2048), epochs, number of crops."""
ARCHITECTURES = ("resnet50", "resnet18", "resnet34", "resnet101", "resnet152")
_FILE_BLOCK, _MODEL_BLOCK = "resizer.", "avgpool.0."


def load_dissl(source: str | Path, *, sha256: str | None = None) -> nn.Module:
    """Load a torchvision ResNet that returns representations.

    Args:
        source: one of NAMES, or the path of a file: the published state dict, a complete VISSL checkpoint, or a state
            dict with the prefix ``trunk.`` or ``_feature_blocks.``.
        sha256: hexadecimal SHA-256 of the file. If it is None, the hash of the first download is stored next to the
            file and checked at each later call.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        UserError: the file or name does not exist, the download fails, the hash differs, the file has another format,
            or a tensor is missing, unexpected or of another shape.
    """
    path = Path(source)
    if not path.is_file():
        if str(source) not in NAMES:
            raise UserError(f"there is no file {source}, and no published weights of that name: {', '.join(NAMES)}")
        path = _downloaded(str(source), sha256)
    elif sha256 is not None:
        check_digest(path, sha256)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is not a readable file of weights: {reason}") from error
    return build(backbone_weights(content, str(path)), str(path)).eval()


def dissl_resnet50(name: str, *, pretrained: bool = True, **options: Any) -> nn.Module:
    """Build the ResNet-50 of one of NAMES, with its published weights or untrained.

    Args:
        name: one of NAMES.
        pretrained: whether to load the weights and set the model to evaluation mode.
        options: options of torchvision's ``resnet50``. If weights are loaded, they must not change its tensors.

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
    """Return the preprocessing of these models: resize to 256, centre crop of 224, ImageNet's mean and deviation."""
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def backbone_weights(content: Any, what: str) -> dict[str, Tensor]:
    """Extract the state dict of the backbone from the content of a file, with the published names.

    Args:
        content: the loaded file.
        what: name of the file, for error messages.

    Raises:
        UserError: the file contains no ResNet.
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
        raise UserError(f"{what} contains no ResNet: it has no conv1.weight")
    return published_names(state)


def vissl_parts(checkpoint: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the state dicts of trunk and heads in a VISSL checkpoint.

    Args:
        checkpoint: a checkpoint with ``classy_state_dict``.
        what: name of the file, for error messages.

    Raises:
        UserError: the checkpoint has no trunk.
    """
    found, done = checkpoint["classy_state_dict"], []
    for key in ("base_model", "model", "trunk"):
        done.append(key)
        if not isinstance(found, Mapping) or not isinstance(found.get(key), Mapping):
            raise UserError(f"{what} is not a complete VISSL checkpoint: it has no {'.'.join(done)}")
        parts, found = found, found[key]
    return parts


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename ``avgpool.0.*`` of the model to ``resizer.*``, as in the published files."""
    return {
        _FILE_BLOCK + key.removeprefix(_MODEL_BLOCK) if key.startswith(_MODEL_BLOCK) else key: value
        for key, value in state.items()
    }


def build(state: Mapping[str, Tensor], what: str) -> nn.Module:
    """Build the ResNet whose tensors all match the weights, and load them in single precision.

    Args:
        state: weights with the published names, dense and of a floating-point type.
        what: name of the file, for error messages.

    Raises:
        UserError: no ResNet matches; the message lists the differences from the most similar one.
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
    """Remove the classifier, and add the block with the given last convolution if its shape is possible."""
    model.fc = nn.Identity()
    if last is None or last.ndim != 4:
        return model
    try:
        return expand_resnet_dim(model, last.shape[0], bottleneck=last.shape[1])
    except ValueError:  # not a multiple of the width of this ResNet
        return model


def _difference(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    odd = [key for key in wanted if key in state and not _castable(state[key], wanted[key].dtype)]
    return {**differences(state, wanted), **({"of another type": odd} if odd else {})}


def _castable(value: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor is dense and has data, and is floating-point if ``dtype`` is."""
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
            raise UserError(f"{url} is not the expected file: {error}") from error
    recorded = record.read_text().strip() if record.is_file() else None
    digest = check_digest(path, sha256 or recorded)
    if recorded is None:
        record.write_text(f"{digest}\n")
    return path


def check_digest(path: Path, expected: str | None) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: it is not the expected one.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)
    if expected is not None and digest != expected.lower():
        raise UserError(f"{path} has the sha256 {digest}, not {expected}; if the file is damaged, delete it")
    return digest


def _digest(file: Any) -> str:
    sha = hashlib.sha256()
    while piece := file.read(2**20):
        sha.update(piece)
    return sha.hexdigest()
