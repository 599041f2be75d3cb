"""The trained trunk of a run as a network in Python, for the losses of this package and for those of VISSL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor, nn
from vissl.config import AttrDict
from vissl.models.trunks import MODEL_TRUNKS_REGISTRY, get_model_trunk

from plugins.methods import METHODS
from plugins.sobel import restore_sobel_
from plugins.tools.command import UserError
from plugins.tools.export import checkpoint_file
from plugins.tools.fitting import load_fitting, plain_names
from plugins.tools.unpickle import read_without_code
from plugins.tools.weights import vissl_parts
from vissl_ext.compat.safe_files import load_file
from vissl_ext.compose import defaults
from vissl_ext.methods import method_options
from vissl_ext.model import adapt_trunk
from vissl_ext.parts import NEED_GPU
from vissl_ext.registry import register

_FILE = "train_config.yaml"
"""File of VISSL in the folder of a run, with its whole configuration."""


class Trunk(nn.Module):
    """The trunk of a run, called with images alone.

    Args:
        trunk: a trunk of VISSL.
        config: the configuration of the run, below ``config``.
    """

    def __init__(self, trunk: nn.Module, config: Any) -> None:
        super().__init__()
        self.trunk, self.config = trunk, config

    def forward(self, images: Tensor, layers: list[str] | None = None) -> Any:
        """Compute features.

        Args:
            images: ``[B, 3, H, W]``, normalised as in the training.
            layers: names of layers, as in ``LINEAR_EVAL_FEAT_POOL_OPS_MAP``; None for the last features.

        Returns:
            The last features ``[B, F]``, or a list with the features of each layer.
        """
        found = self.trunk(images, layers or [])
        return list(found) if layers else found[0].flatten(1)


def load(source: str | Path, config: str | Path | None = None) -> Trunk:
    """Load the trunk of a checkpoint; see :func:`vissl_ext.load_model`."""
    register()
    path = checkpoint_file(Path(source).expanduser())
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    place = path.parent / _FILE if config is None else Path(config).expanduser()
    if not place.is_file():
        raise UserError(
            f"{path} needs the configuration of its run, but there is no file {place}: give config=FILE, or load a "
            "ResNet with plugins.tools.hub.load_weights"
        )
    given = load_file(str(place))
    if not isinstance(given, Mapping) or not isinstance(given.get("MODEL"), Mapping):
        raise UserError(f"{place} is not the configuration of a run of VISSL: it has no section MODEL")
    run = AttrDict(OmegaConf.to_container(OmegaConf.merge(defaults().config, dict(given))))
    name = run.MODEL.TRUNK.NAME
    if name not in MODEL_TRUNKS_REGISTRY or name in NEED_GPU:
        reason = "needs a GPU" if name in NEED_GPU else "is not registered: import the module that registers it first"
        raise UserError(f"{place}: the trunk {name} {reason}")
    run.MODEL.ACTIVATION_CHECKPOINTING.USE_ACTIVATION_CHECKPOINTING = False
    trunk = get_model_trunk(name)(run.MODEL, name)
    content = read_without_code(path)[0]
    if not isinstance(content, Mapping) or "classy_state_dict" not in content:
        raise UserError(f"{path} is not a checkpoint of VISSL: it has no classy_state_dict")
    state = plain_names(vissl_parts(content, str(path))["trunk"])
    if state and all(key.startswith("base_model.") for key in state):  # of an evaluation
        state = {key.removeprefix("base_model."): value for key, value in state.items()}
    spec = METHODS.get(run.LOSS.name)
    options = {} if spec is None else method_options(spec.name, run.LOSS.get(spec.name) or {})[0]
    if spec is not None:
        spec.prepare(options, trunk)
        run.MODEL.TRUNK.PATCHES = run.MODEL.TRUNK.get("PATCHES") or spec.eval_patches(options)
    adapt_trunk(run.MODEL, restore_sobel_(trunk, state))
    load_fitting(trunk, state, path, f"trunk than {name} of {place}")
    return Trunk(trunk, run).eval()
