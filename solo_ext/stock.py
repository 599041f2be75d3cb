"""Make our methods available in solo-learn's own, unmodified main_pretrain.py and main_linear.py.

``hydra_plugins`` calls ``activate`` in every process that runs one of these scripts of the main branch. Hydra finds
that folder if ssl-plugins is installed or PYTHONPATH contains its checkout. Loaded modules are changed, but no files:

* ``method`` may be one of our methods. It is selected as in our command, and its options are validated
  (``solo_ext.registry``). solo-learn's own methods are replaced by the corrected ones (``solo_ext.compat``).
* ``data.dataset`` and ``backbone.name`` may be one of ours.
* ``devices`` may be a number, also on a CPU, and ``strategy`` is optional.
* The k-NN classifier works, and DALI works without a GPU (``solo_ext.compat.solo_main``).
"""

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from plugins.spec import MethodSpec
from plugins.tools.command import UserError, exit_on_user_error
from solo_ext.architectures import ARCHITECTURES
from solo_ext.compat import CHECKOUT, GENERATION, native_methods
from solo_ext.compat.common import CIFAR_STEM, fill_defaults
from solo_ext.config import count_stacks, device_list, large_and_small, settle_devices
from solo_ext.datasets import preparation_hint, split_path
from solo_ext.registry import ALIASES, method_class, plugin_methods, register
from solo_ext.transforms import (
    DATASETS,
    evaluation_side,
    evaluation_transform,
    has_masks,
    linear_crop,
    linear_transform,
)


class Scripts:
    """Replacements for functions of solo-learn that the script of this process calls.

    Args:
        own: the datasets that solo-learn does not have, by name.
    """

    def __init__(self, own: dict[str, Any]) -> None:
        self.own = own
        self.cfg: DictConfig | None = None

    def parse_pretrain(self, original: Callable, cfg: DictConfig) -> DictConfig:
        """Validate the configuration of a pre-training, and add the class that trains the method to METHODS."""
        from solo.methods import METHODS

        with exit_on_user_error():
            if count_stacks(cfg.get("augmentations") or ()):  # main would make an ordinary view of the entry
                raise UserError(f"solo-learn's own script cannot make stacks of patches; {_INSTEAD}")
            if any(has_masks(view) for view in cfg.get("augmentations") or ()):  # main would ignore the entry
                raise UserError(f"augmentations.masks is not available in solo-learn's own script; {_INSTEAD}")
            if any(view.get("steps") is not None for view in cfg.get("augmentations") or ()):  # main has no such entry
                raise UserError(f"augmentations.steps is not available in solo-learn's own script; {_INSTEAD}")
            if steps := _ignored_steps(cfg):  # main would train without them
                be = "is" if len(steps) == 1 else "are"
                raise UserError(f"{', '.join(steps)} {be} not available in solo-learn's own script; {_INSTEAD}")
        cfg = self._parse(original, cfg)
        if cfg.data.dataset in self.own:
            # main's transform uses these values for a dataset that is not in its own table
            info = self.own[cfg.data.dataset]
            for view in cfg.augmentations:
                view.mean, view.std = list(info.mean), list(info.std)
        with exit_on_user_error():
            large_and_small(cfg.augmentations)
            METHODS[cfg.method] = method_class(cfg)
            _check_input(METHODS[cfg.method], cfg)
        # the script relies on main's classes, which fill in the defaults of their argument in place; our classes do not
        return fill_defaults(cfg)

    def parse_linear(self, original: Callable, cfg: DictConfig) -> DictConfig:
        """Validate the configuration of a linear evaluation."""
        cfg = self._parse(original, cfg)
        if cfg.backbone.name in ARCHITECTURES:
            # as in pre-training, where the script changes the stem only of networks whose name starts with resnet
            cfg.backbone.kwargs.setdefault("cifar", cfg.data.dataset in CIFAR_STEM)
        return cfg

    def _parse(self, original: Callable, cfg: DictConfig) -> DictConfig:
        with exit_on_user_error():
            try:
                OmegaConf.resolve(cfg)
            except OmegaConfBaseException as error:
                raise UserError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from None
            devices = device_list(cfg.get("devices", 1))
            if cfg.data.dataset in self.own:
                _find_folders(cfg.data)
        # main multiplies the learning rate by the length of this list
        cfg.devices = list(range(devices)) if isinstance(devices, int) else devices
        self.cfg = OmegaConf.create(OmegaConf.to_container(cfg))
        cfg = original(cfg)
        settle_devices(cfg, devices)
        return cfg

    def folders(self, original: Callable, dataset: str, *args: Any, **kwargs: Any) -> Any:
        """Call main's ``prepare_datasets``; our datasets are folders like its custom data."""
        return original("custom" if dataset in self.own else dataset, *args, **kwargs)

    def transforms(self, original: Callable, dataset: str) -> tuple[Any, Any]:
        """Call main's ``prepare_transforms``: the transforms of linear training and of evaluation."""
        if dataset not in self.own:
            return original(dataset)
        cfg = self.cfg or OmegaConf.create({"data": {}})
        views = cfg.get("augmentations")
        side = evaluation_side(views[0], dataset) if views else linear_crop(dataset, cfg).side
        return linear_transform(dataset, cfg), evaluation_transform(dataset, side)


def _ignored_steps(cfg: DictConfig) -> list[str]:
    """Return the steps of this package in a configuration that main's transforms do not have."""
    steps = ["shared_flip"] if cfg.get("shared_flip") else []
    for place, view in enumerate(cfg.get("augmentations") or ()):
        steps += [f"augmentations.{place}.{name}" for name in ("translate", "photometric") if _happens(view.get(name))]
    return steps


def _happens(step: Any) -> bool:
    return step is not None and bool(step.get("prob", 1.0))


def _check_input(method: type, cfg: DictConfig) -> None:
    """Raise an error for a method that needs data which the script's loaders do not provide."""
    spec: MethodSpec | None = getattr(method, "spec", None)
    if spec is not None and spec.indexed and cfg.data.format == "dali":
        raise UserError(
            f"method {spec.name} needs the positions of the images in the training set, which solo-learn's own DALI "
            f"loader does not provide; use data.format=image_folder, or {_INSTEAD}"
        )


_INSTEAD = "run the same configuration with python -m solo_ext.main_pretrain"


def _find_folders(data: DictConfig) -> None:
    for key, split in (("train_path", "train"), ("val_path", "val")):
        data[key] = split_path(data.dataset, str(data.get(key)), split)
        if not Path(data[key]).is_dir():
            raise UserError(f"data.{key} is not a folder: {data[key]}{preparation_hint(data.dataset)}")


def _replace(module: ModuleType, name: str, instead: Callable) -> None:
    """Replace a function in its module and in the script, which has imported it by name.

    Args:
        module: the module of the function.
        name: the name of the function.
        instead: the replacement; its first argument is the function, the others are those of the call.
    """
    original = getattr(module, name)

    @wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return instead(original, *args, **kwargs)

    for holder in (module, sys.modules["__main__"]):
        if vars(holder).get(name) is original:
            setattr(holder, name, replacement)


def activate() -> None:
    """Change the loaded modules of the main branch as the docstring of this module describes.

    Raises:
        UserError: solo-learn 1.0.2 is installed, which does not have these scripts.
    """
    if GENERATION != "main":
        raise UserError(f"solo-learn 1.0.2 has no scripts to extend; set {CHECKOUT} to a checkout of its main branch")
    import solo.args.linear
    import solo.args.pretrain
    import solo.data.classification_dataloader as classification
    import solo.data.pretrain_dataloader as pretrain
    from solo.methods import METHODS

    from solo_ext.compat.solo_main import patch_dali

    patch_dali()
    natives = native_methods()  # reads METHODS, before our methods are added to it
    register()
    METHODS.update({alias: plugin_methods()[name] for alias, name in ALIASES.items() if alias not in natives})

    known = solo.args.pretrain._SUPPORTED_DATASETS
    scripts = Scripts({name: info for name, info in DATASETS.items() if name not in known})
    for module in (solo.args.pretrain, solo.args.linear):
        module._SUPPORTED_DATASETS += list(scripts.own)
        module._N_CLASSES_PER_DATASET.update({name: info.classes for name, info in scripts.own.items()})
    _replace(solo.args.pretrain, "parse_cfg", scripts.parse_pretrain)
    _replace(solo.args.linear, "parse_cfg", scripts.parse_linear)
    _replace(pretrain, "prepare_datasets", scripts.folders)
    _replace(classification, "prepare_datasets", scripts.folders)
    _replace(classification, "prepare_transforms", scripts.transforms)
