"""Build the models, backbones, transforms and data loaders that the options select."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torchvision
from lightly.data import LightlyDataset
from lightly.transforms.utils import IMAGENET_NORMALIZE
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

from lightly_ext.benchmarks.methods import METHODS
from lightly_ext.benchmarks.schema import Options
from lightly_ext.data import IndexedDataset
from lightly_ext.models import MethodModel
from lightly_ext.transforms import TwoViewTransform
from plugins.tools.backbones import BACKBONES, backbone_options, headless_backbone, without_classifier
from plugins.tools.command import UserError, did_you_mean
from plugins.tools.export import read_backbone
from plugins.tools.fitting import mismatch
from plugins.tools.folders import ImageFolder
from plugins.tools.images import open_image
from plugins.tools.library_names import library_names
from plugins.tools.regnet import small_stem_
from plugins.tools.stems import fit_stem_

_LARGE = 64  # up to this side in pixels, evaluation resizes to the input size, without a margin that is cropped


@dataclass(frozen=True)
class Setup:
    """The options of the command line, with functions that build the objects they select.

    Args:
        options: the options of the command line.
        table: {method: {"model": LightningModule class, "transform": transform}} of our methods and those of --add.
        classes: the sorted names of the class folders of --train-dir.
        epochs_before: number of completed epochs of the checkpoint --ckpt-path.
    """

    options: Options
    table: Mapping[str, Mapping[str, Any]]
    classes: Sequence[str]
    epochs_before: int = 0

    @property
    def methods(self) -> list[str]:
        """The methods to train, without duplicates."""
        return list(dict.fromkeys(self.options.methods or METHODS))

    @property
    def topk(self) -> tuple[int, ...]:
        """The values of k of the top-k accuracies."""
        return (1, 5) if len(self.classes) >= 5 else (1,)

    @property
    def normalize(self) -> dict[str, list[float]]:
        """Mean and standard deviation of the channels."""
        mean, std = self.options.mean, self.options.std
        return IMAGENET_NORMALIZE if mean is None or std is None else {"mean": mean, "std": std}

    def config(self) -> dict[str, Any]:
        """Return the resolved options as values that can be written to JSON."""
        resolved = {"methods": self.methods, "classes": list(self.classes), "normalize": self.normalize}
        return {**self.options.model_dump(mode="json"), **resolved}

    def is_ours(self, name: str) -> bool:
        """Return whether a method is one of this package, whose models accept more options."""
        return issubclass(self.table[name]["model"], MethodModel)

    def wants_knn(self, name: str) -> bool:
        """Return whether a model evaluates kNN during training, as the latest models of lightly do."""
        return {"knn_k", "knn_t"} <= set(inspect.signature(self.table[name]["model"].__init__).parameters)

    def model(self, name: str) -> LightningModule:
        """Build the model of a method; our models receive the backbone and the options of the command line.

        Raises:
            UserError: the model does not accept an option or the backbone.
        """
        options, cls = self.options, self.table[name]["model"]
        given: dict[str, Any] = {
            "batch_size_per_device": options.batch_size_per_device,
            "num_classes": len(self.classes),
        }
        if self.wants_knn(name):
            given.update(knn_k=options.knn_k, knn_t=options.knn_t)
        if self.is_ours(name):
            shared = ("optimizer", "lr", "weight_decay", "warmup_epochs", "decay_all")
            # an option that only other selected methods have is not passed
            others = {key for other in self.methods if self.is_ours(other) for key in self._spec(other).options}
            own = self._spec(name).options
            given.update({key: value for key, value in options.option.items() if key in own or key not in others})
            given.update({key: getattr(options, key) for key in shared}, backbone=backbone(options))
        try:
            return cls(**given)
        except (ValueError, TypeError) as error:
            raise UserError(f"{name}: {error}") from None

    def _spec(self, name: str) -> Any:
        return self.table[name]["model"].spec

    def transform(self, name: str) -> Any:
        """Return the transform of a method; our transforms receive the arguments of the command line.

        Raises:
            UserError: the transform has no such argument.
        """
        transform = self.table[name]["transform"]
        if not self.is_ours(name):
            return transform
        flat = type(transform)
        if "view_1_transform" in inspect.signature(flat).parameters:
            flat = TwoViewTransform  # lightly's BYOL transform has only the transforms of its views as arguments
        known = sorted(inspect.signature(flat).parameters)
        given = {"input_size": self.options.input_size, "normalize": self.normalize, **self.options.transform}
        if given.get("masks") is not None:
            given.setdefault("images", str(self.options.train_dir))
        if "solarization_prob" in given and "solarization_prob" not in known:
            # lightly's transforms have two names for it, and those without solarization have no such argument
            probability = given.pop("solarization_prob")
            if "solarize_prob" in known:
                given.setdefault("solarize_prob", probability)
            elif probability != 0:
                given["solarization_prob"] = probability
        for key in given:
            if key not in known:
                raise UserError(
                    f"--transform: {flat.__name__} has no argument {key!r}; known arguments: {', '.join(known)}"
                    f"{did_you_mean(key, known)}"
                )
        return flat(**given)

    def plain(self) -> Any:
        """Return the transform for evaluation."""
        size = self.options.input_size
        resize = T.Resize(size if size <= _LARGE else size * 256 // 224)
        return T.Compose([resize, T.CenterCrop(size), T.ToTensor(), T.Normalize(**self.normalize)])

    def augmented(self) -> Any:
        """Return the transform for the training of a classifier."""
        options = self.options
        crop = T.RandomResizedCrop(options.input_size, scale=(options.eval_min_scale, 1.0))
        flip = T.RandomHorizontalFlip(options.eval_hf_prob)
        return T.Compose([crop, flip, T.ToTensor(), T.Normalize(**self.normalize)])

    def loader(self, folder: Path, transform: Any, *, shuffle: bool = False, indexed: bool = False) -> DataLoader:
        """Return the batches of a folder.

        Args:
            folder: with one folder for each class.
            transform: of a PIL image.
            shuffle: whether they are for training: shuffled, and all of the same size.
            indexed: whether each image comes with its position in place of its file name, and can be had as it is
                evaluated.
        """
        options = self.options
        images: Any = image_folder(folder, transform)
        return DataLoader(
            IndexedDataset(images, evaluation=image_folder(folder, self.plain())) if indexed else images,
            batch_size=options.batch_size_per_device,
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=options.num_workers,
        )


def backbone(options: Options) -> nn.Module:
    """Build a network of torchvision or of BACKBONES, without its classifier, with the weights of --weights.

    Raises:
        UserError: there is no such network, it does not accept images of this size or one of --backbone-option, or the
            weights are those of another network.
    """
    name = options.backbone
    published = torchvision.models.list_models(module=torchvision.models)
    known = sorted({*published, *BACKBONES})
    if name not in known:
        raise UserError(
            f"--backbone: unknown model {name!r}; choose from {', '.join(known)}{did_you_mean(name, known)}"
        )
    try:
        # a ViT and some encoders accept only images of the size that their constructor gets
        if name in BACKBONES:
            sized = {"size": options.input_size} if "size" in backbone_options(name) else {}
            network = headless_backbone(name, **{**sized, **options.backbone_option})
        else:
            sized = {"image_size": options.input_size} if name.startswith("vit_") else {}
            sized.update(options.backbone_option)
            network = without_classifier(torchvision.models.get_model(name, weights=None, **sized))
    except TypeError as error:
        raise UserError(f"--backbone-option: {name}: {first_line(error)}") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        size = options.input_size
        raise UserError(f"--backbone {name} does not accept --input-size {size}: {first_line(error)}") from None
    if options.small_images and isinstance(network, torchvision.models.RegNet):
        small_stem_(network)
    elif options.small_images:
        if not isinstance(network, torchvision.models.ResNet):
            raise UserError(f"--small-images needs a ResNet or a RegNet, got --backbone {name}")
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    if options.weights is not None:
        found = read_backbone(options.weights)
        state = library_names(found.state, "torchvision")
        if reason := mismatch(state, network.state_dict()):
            raise UserError(f"--weights: {options.weights} is of another backbone than {name}: {reason}")
        fit_stem_(network, found.stem).load_state_dict(state)
    return network


def image_folder(folder: Path, transform: Any) -> LightlyDataset:
    """Open class folders as a LightlyDataset; images are decoded as in the other frameworks.

    Args:
        folder: folder with a subfolder for each class.
        transform: transform of a PIL image in RGB.
    """
    return LightlyDataset.from_torch_dataset(ImageFolder(str(folder), loader=open_image), transform=transform)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
