"""Functions that the three examples share: command line, images, a small network, optimiser, and kNN accuracy."""

import argparse
from pathlib import Path
from typing import Any

import torch
from lightly.data import LightlyDataset
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms as T

from lightly_ext import models
from lightly_ext.data import IndexedDataset
from lightly_ext.names import CLASS_NAMES
from lightly_ext.transforms import TwoViewTransform
from plugins.methods import METHODS
from plugins.tools.command import Parser, UserError, nearest, positive_number
from plugins.tools.data import make_digits
from plugins.tools.folders import ImageFolder, check_same_classes, class_names
from plugins.tools.images import open_image
from plugins.tools.knn import knn_accuracy

MODELS = {spec.name: vars(models)[name] for name, spec in CLASS_NAMES.items() if not spec.stacks}
"""The model class by the key of a method: ``MODELS["isoloss"]`` is ``lightly_ext.models.IsoLoss``.

Methods that compare stacks of patches need another transform and the positions of the images, see docs/lightly.md.
"""

SIZE, BATCH = 16, 64
"""Side of the images in pixels, and batch size on each process."""

CHANNELS = 16
"""Channels of the first convolution; the network has eight times as many features."""

WIDTHS = {
    **{"proj_hidden_dim": 512, "proj_output_dim": 256, "pred_hidden_dim": 512},
    **{"n_classes": 1024, "num_prototypes": 64},
}
"""Widths of the heads for a small network; the defaults are the widths of the papers."""

ADAMW = {"byol", "cissl", "dissl", "matrix_ssl", "simsiam"}
"""Methods that learn little from SGD in a few hundred steps."""


def optimizer(method: str, parameters: Any) -> torch.optim.Optimizer:
    """Build the optimiser for small images: AdamW for the methods in ADAMW, SGD with momentum for the others."""
    if method in ADAMW:
        return torch.optim.AdamW(parameters, lr=1e-3)
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9)


def build(method: str) -> models.MethodModel:
    """Build the model of a method with a ResNet of 128 features, which is small enough for two CPU cores."""
    cls = MODELS[method]
    widths = {key: value for key, value in WIDTHS.items() if key in cls.spec.options}
    return cls(_backbone(), input_dim=8 * CHANNELS, **widths)


class _Block(nn.Module):
    """A residual block that halves the resolution."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(in_channels, channels, 1, stride=2, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.residual(x) + self.shortcut(x)).relu()


def _backbone() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
    for number in (2, 3, 4):  # with the names of a ResNet's stages, which AMDIM looks for
        width = CHANNELS * 2 ** (number - 1)
        network.add_module(f"layer{number}", _Block(width // 2, width))
    network.add_module("avgpool", nn.AdaptiveAvgPool2d(1))
    return network


def arguments(description: str, method: str, given: list[str] | None = None, **more: Any) -> argparse.Namespace:
    """Parse the command line, and create the digits if no other images are given.

    Args:
        description: first line of ``--help``.
        method: default of ``--method``.
        given: the arguments of the command line; None means those of the process.
        more: further options: {name: keyword arguments of ``add_argument``}.

    Raises:
        UserError: the method is unknown, or a folder has no or too few images.
    """
    parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", default=method, help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--steps", type=positive_number(int), default=200, help="optimiser steps")
    parser.add_argument(
        "--data", type=Path, help="folder with train/ and val/, each with a subfolder per class; default: digits"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentations")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    args = parser.parse_args(given)
    if args.method in METHODS and args.method not in MODELS:
        raise UserError(
            f"--method: the examples do not train {args.method}, which needs the indexes of the images and stacks of "
            "patches; see docs/lightly.md"
        )
    if args.method not in MODELS:
        near = nearest(args.method, MODELS)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(MODELS)}"
        raise UserError(f"--method: unknown method {args.method!r}; {hint}")
    if args.data is None:
        args.data = Path("datasets/digits")
        make_digits(args.data)
    for split in ("train", "val"):
        if not (args.data / split).is_dir():
            raise UserError(f"--data must be a folder with train/ and val/, but {args.data} has no folder {split}")
    check_same_classes(*(part for split in ("train", "val") for part in _classes(args.data / split)))
    images = len(dataset(args.data / "train"))
    if images < BATCH:
        raise UserError(f"--data: a batch needs {BATCH} training images, but {args.data / 'train'} contains {images}")
    torch.manual_seed(args.seed)
    return args


def _classes(folder: Path) -> tuple[Path, list[str]]:
    return folder, class_names(folder)


def dataset(folder: Path, transform: Any = None) -> LightlyDataset:
    """Open a folder of class folders as a LightlyDataset.

    Raises:
        UserError: the folder has no images, or a class has none.
    """
    try:
        images = ImageFolder(str(folder), loader=open_image)
    except FileNotFoundError as error:
        raise UserError(f"--data: {folder}: {str(error).splitlines()[0]}") from None
    return LightlyDataset.from_torch_dataset(images, transform=transform)


def views(folder: Path) -> DataLoader:
    """Load batches ``([view, view], labels, positions)`` for training, with augmentations for small digits.

    There is no flip, since a mirrored digit has another class, and no blur, since the images have only 16 pixels. The
    colour jitter is strong, since each digit has a random colour. For photographs, use the transform of the method,
    such as ``lightly_ext.transforms.IsoLossTransform()``.
    """
    transform = TwoViewTransform(
        input_size=SIZE,
        min_scale=0.6,
        cj_prob=1.0,
        cj_bright=0.4,
        cj_contrast=0.4,
        cj_sat=0.8,
        cj_hue=0.5,
        random_gray_scale=0.5,
        gaussian_blur=0.0,
        solarization_prob=0.0,
        hf_prob=0.0,
    )
    images = IndexedDataset(dataset(folder, transform), evaluation=dataset(folder, plain()))
    return DataLoader(images, batch_size=BATCH, shuffle=True, drop_last=True)


def plain() -> Any:
    """Make the transform of images without augmentation."""
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return T.Compose([T.Resize(SIZE), T.CenterCrop(SIZE), T.ToTensor(), normalize])


@torch.no_grad()
def knn(model: nn.Module, data: Path) -> float:
    """Compute the kNN accuracy of a model's features on the validation images, in percent."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found = []
    for split in ("train", "val"):
        batches = [
            (model(images.to(device)).cpu(), labels)
            for images, labels, _ in DataLoader(dataset(data / split, plain()), batch_size=256)
        ]
        found += [torch.cat(part) for part in zip(*batches, strict=True)]
    model.train(training)
    return knn_accuracy(*found)[0]
