"""A toy method that uses every mechanism of a method, for runner.py and a pool of ranks."""

from typing import Any, NamedTuple

import torch
import watched
from torch import Tensor, nn

# isort: split
from classy_vision.dataset.transforms import register_transform
from classy_vision.dataset.transforms.classy_transform import ClassyTransform
from vissl.data.ssl_transforms import ssl_transforms_wrapper

import vissl_ext.methods
import vissl_ext.task
from plugins.clock import Clock, Stepped
from plugins.heads import MapHead
from plugins.methods import METHODS
from plugins.spec import Embeddings, Hints, MethodSpec, Option, Paper
from plugins.targets import IndexedBank

D, K, PATCHES = 4, 3, 2
IMAGES = "{name:Resize,size:[16,16]},{name:ToTensor}"
CONFIG = [
    "config=pretrain/ssl_ey/digits",
    *watched.TINY,
    *("config.LOSS.name=toy", "+config.LOSS.toy={base_tau:0.5}"),
    f"config.DATA.TRAIN.TRANSFORMS=[{{name:ToyPatches}},{IMAGES},{{name:StackPatches}}]",
    f"config.DATA.TEST.TRANSFORMS=[{IMAGES}]",
    *("config.OPTIMIZER.name=sgd", "config.OPTIMIZER.momentum=0.9"),
]
"""The overrides that train the method on digits, with a tiny network."""


class Head(MapHead):
    """Project features ``[B, F]``, or the mean of those of a stack ``[B, P, F]``, and maps likewise."""

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features_dim, D)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features if features.ndim == 2 else features.mean(1))

    def build(self, channels: list[int]) -> None:
        self.local = nn.ModuleList(nn.Conv2d(count, D, 1) for count in channels)

    def project_maps(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(conv(m if m.ndim == 4 else m.mean(1)) for conv, m in zip(self.local, maps, strict=True))


class Prototypes(Stepped, nn.Module):
    """A predictor that begins each epoch with the mean features of all images, and is frozen at first.

    Buffers:
        passes: number of passes over the training set; of images in them; of steps that it saw open and end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, K, bias=False)
        self.register_buffer("passes", torch.zeros(4, dtype=torch.int64))

    def predict(self, z: list[Tensor]) -> list[Tensor]:
        assert self.stepping or not self.training
        return [self.layer(view) for view in z]

    def start_epoch(self, epoch: int, feed: Any) -> list[nn.Parameter]:
        images = {view: [*feed(view=view, mode=view)] for view in ("eval", "train")}
        parts = [torch.zeros(3) for _ in range(2)]
        for index, (features,) in images["eval"]:
            parts[0][index % 3] += features.sum(1).cpu()
            parts[1] += torch.bincount(index.cpu() % 3, minlength=3)
        for part in parts:
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(part)
        self.passes += torch.tensor([1, int(parts[1].sum()), 0, 0])
        assert sum(len(index) for index, _ in images["train"]) == sum(len(index) for index, _ in images["eval"])
        with torch.no_grad():
            self.layer.weight.copy_((parts[0] / parts[1])[:, None].expand(K, D))
        return [self.layer.weight]

    def before_step(self) -> None:
        super().before_step()
        self.passes[2] += 1

    def after_step(self) -> None:
        self.passes[3] += int(self.stepping)
        super().after_step()


class Terms(NamedTuple):
    loss: Tensor


class Loss(nn.Module):
    """Distance of the image from its row of a bank, the teacher and the patches' maps, times a learned scale."""

    def __init__(self, options: Any, comm: Any) -> None:
        super().__init__()
        self.clock, self.bank, self.comm = Clock(), IndexedBank(None, D), comm
        self.scale, self.unused = nn.Parameter(torch.randn(2)), nn.Parameter(torch.ones(()))

    def forward(self, e: Embeddings) -> Terms:
        self.clock()
        (image, stack), (target,) = e.z, e.target
        assert len(e.index) == len(image) and image.shape == stack.shape == (len(image), D)
        rows = self.comm.sum(image.new_tensor(float(len(image))))
        distances = (image - self.bank.read(e.index)).square().sum() + (stack - target).square().sum()
        assert [[m.ndim, late.shape[2:]] for m, late in e.maps] == [[4, (2, 2)]] * 2
        for z, maps in zip(e.z[::-1], e.maps, strict=True):
            distances = distances + sum((z[:, :, None, None] - map_).square().sum() for map_ in maps) / 100
        parts = [distances, sum(p.square().sum() for p in e.p)]
        loss = self.comm.sum((self.scale * torch.stack(parts)).sum()) / rows
        if self.training:
            self.bank.write(e.index, image.detach(), self.comm)
        return Terms(loss)


SPEC = MethodSpec(
    name="toy",
    loss=Loss,
    head=lambda features_dim, options: Head(features_dim),
    predictor=lambda options, comm: Prototypes(),
    teacher=True,
    views=1,
    stacks=1,
    indexed=True,
    options={
        "proj_output_dim": Option(D, "width", low=1),
        "log_eigvals": Option(False, "no"),
        "module": Option("1", ""),
    },
    paper=Paper("Toy", "this file"),
    hints=lambda options: {
        "predictor": Hints(frozen_steps=4, momentum=0.0),
        "loss": Hints(lr_scale=0.1, no_decay=True, lr_constant=True),
    },
    taps=lambda options: {"layers.0": None, options["module"]: 2},
)


@register_transform("ToyPatches")
class ToyPatches(ClassyTransform):
    """Image → the image and two patches."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ToyPatches":
        return cls()

    def __call__(self, image: Any) -> list[Any]:
        left = int(torch.randint(9, ()))
        return [image, *(image.crop((left, top, left + 8, top + 8)) for top in (0, 8))]


def install() -> None:
    """Register the method in this process."""
    if "toy" not in vissl_ext.methods.METHODS:
        vissl_ext.methods.METHODS = vissl_ext.task.METHODS = {**METHODS, "toy": SPEC}
        vissl_ext.methods.register_method(SPEC)
        ssl_transforms_wrapper.DEFAULT_TRANSFORM_TYPES["TRANSFORMS_WITH_COPIES"].append("ToyPatches")
