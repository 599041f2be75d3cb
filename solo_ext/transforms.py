"""Properties of the datasets, and the transforms that the YAML format of solo-learn's main branch describes."""

from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from PIL import ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms as T

from plugins.patches import Patches, grid_side
from plugins.tools.geometry import SharedFlip, Translate
from plugins.tools.masks import RemoveBackground
from plugins.tools.stacks import Grid, Jigsaw, Photometric, Rotation, Stack
from plugins.tools.steps import COLOURS, build_steps, named_steps
from solo_ext.compat import host_data
from solo_ext.schema import Views, validate


class DatasetInfo(NamedTuple):
    """Properties of a dataset.

    Args:
        classes: number of classes; None means the number of class folders.
        mean, std: mean and standard deviation of each channel, in [0, 1]; None means those of the YAML entry, or of
            ImageNet.
        resize: (length of the shorter edge, side of the centre crop) for evaluation, in pixels; None means no resizing.
        side: side of the training images of a linear evaluation, in pixels.
        flip: whether a linear evaluation flips images horizontally; False if a mirrored image has another class.
    """

    classes: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    resize: tuple[int, int] | None
    side: int = 224
    flip: bool = True


_IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
DATASETS = {
    "cifar10": DatasetInfo(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), None, 32),
    "cifar100": DatasetInfo(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), None, 32),
    "stl10": DatasetInfo(10, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261), (96, 96), 96),
    "tinyimagenet": DatasetInfo(200, *_IMAGENET, (64, 64), 64),
    "imagenet100": DatasetInfo(100, *_IMAGENET, (256, 224)),
    "imagenet": DatasetInfo(1000, *_IMAGENET, (256, 224)),
    "custom": DatasetInfo(None, None, None, None),
    "digits": DatasetInfo(10, (0.2692, 0.2715, 0.2712), (0.1796, 0.1785, 0.1798), None, 16, flip=False),
}
CLASSES = {name: info.classes for name, info in DATASETS.items() if info.classes}


def complete_views(views: Any) -> list[dict[str, Any]]:
    """Validate the entries of ``augmentations``, and disable the steps that are missing.

    Returns:
        The entries, each with every step.

    Raises:
        UserError: an entry is missing, unknown or out of range.
    """
    given = OmegaConf.to_container(views) if OmegaConf.is_config(views) else views
    return validate(Views, {"augmentations": given})["augmentations"]


def statistics(dataset: str, cfg: Any = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel: those of the dataset, else ``cfg.mean`` and ``cfg.std``."""
    info = DATASETS[dataset]
    if info.mean is not None and info.std is not None:
        return info.mean, info.std
    given = cfg or {}
    return tuple(given.get("mean", IMAGENET_DEFAULT_MEAN)), tuple(given.get("std", IMAGENET_DEFAULT_STD))


def view_transform(dataset: str, cfg: DictConfig) -> T.Compose:
    """Build the transform of a PIL image from a complete entry of ``augmentations``, in main's order or its own."""
    if cfg.get("steps") is not None:
        return build_steps(_plain(cfg.steps))
    bicubic = T.InterpolationMode.BICUBIC
    if cfg.rrc.enabled:
        scale = (cfg.rrc.crop_min_scale, cfg.rrc.crop_max_scale)
        crop = [T.RandomResizedCrop(cfg.crop_size, scale=scale, interpolation=bicubic)]
    else:
        # the crop makes images square, as a batch needs; main fails on the first image that is not
        crop = [T.Resize(cfg.crop_size, interpolation=bicubic), T.CenterCrop(cfg.crop_size)]
    return T.Compose([*crop, *_steps(dataset, cfg)])


def _plain(steps: Any) -> list[Any]:
    return OmegaConf.to_container(steps) if OmegaConf.is_config(steps) else steps


def stack_transform(dataset: str, cfg: DictConfig) -> Any:
    """Build the transform from a PIL image to a stack of patches, ``[P, 3, h, w]``; each patch has its own steps."""
    if cfg.get("steps") is not None:
        before, each = build_steps(_plain(cfg.steps)), build_steps(_plain(cfg.patch_steps))
        if cfg.get("grid") is not None:
            cut: Any = Grid(cfg.grid.side, cfg.crop_size, cfg.grid.stride, scale=None)
        else:
            cut = Jigsaw(cfg.jigsaw.side, cfg.crop_size, cfg.jigsaw.grid, scale=None)
        return T.Compose([*before.transforms, Stack(cut, each)])
    scale, bicubic = (cfg.rrc.crop_min_scale, cfg.rrc.crop_max_scale), T.InterpolationMode.BICUBIC
    if cfg.get("grid") is not None:
        grid, flip = cfg.grid, cfg.horizontal_flip.prob
        window, padding = grid.get("window"), grid.get("padding", 0)
        crop = {"scale": scale if cfg.rrc.enabled else None, "interpolation": bicubic}
        pieces: Any = Grid(grid.side, cfg.crop_size, grid.stride, window=window, padding=padding, flip=flip, **crop)
    elif cfg.rotation:
        pieces = Rotation(cfg.crop_size, scale=scale, interpolation=bicubic)
    else:
        jigsaw = cfg.jigsaw
        pieces = Jigsaw(jigsaw.side, cfg.crop_size, jigsaw.grid, scale=scale, interpolation=bicubic)
    return Stack(pieces, T.Compose(_steps(dataset, cfg)))


def is_stack(cfg: Any) -> bool:
    """Return whether an entry of ``augmentations`` makes a stack of patches and not a view."""
    return cfg.get("jigsaw") is not None or cfg.get("grid") is not None or bool(cfg.get("rotation"))


def patches_of(cfg: Any) -> Patches:
    """Return what the stack of an entry of ``augmentations`` consists of."""
    if cfg.get("grid") is not None:
        return Patches(grid_side(cfg.grid.side, cfg.crop_size, cfg.grid.stride) ** 2, cfg.crop_size, cfg.grid.stride)
    return Patches(1 if cfg.get("rotation") else cfg.jigsaw.get("grid", 3) ** 2)


def shares_colours(cfg: Any) -> bool:
    """Return whether all patches of an entry with a grid have the colours of the image, changed by no step."""
    if cfg.get("patch_steps") is not None:
        changed = {name for name, _ in named_steps(_plain(cfg.patch_steps))} & COLOURS
        return cfg.get("grid") is not None and not changed
    steps = ("photometric", "solarization", "equalization", "grayscale")
    jitter = cfg.color_jitter
    jitters = jitter.prob and any((jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue))
    return cfg.get("grid") is not None and not jitters and not any(cfg[step].prob for step in steps)


def evaluation_side(view: Any, dataset: str | None = None) -> int:
    """Return the side of the images of evaluation, in pixels, of the first entry of ``augmentations``.

    It is that of the training images. A grid of a crop that is not resized has the data set's own.
    """
    own = DATASETS[dataset].side if dataset in DATASETS else 224
    if view.get("grid") is None:
        return view.get("crop_size", own)
    return view["grid"]["side"] if view["rrc"]["enabled"] else own


def has_masks(cfg: Any) -> bool:
    """Return whether an entry of ``augmentations`` removes the background of images."""
    return cfg.get("masks") is not None


def _steps(dataset: str, cfg: DictConfig) -> list[Any]:
    """Build the steps after the crop."""
    steps: list[Any] = []
    if cfg.translate.prob:
        steps.append(Translate(cfg.translate.pixels, cfg.translate.prob))
    jitter = cfg.color_jitter
    if jitter.prob:
        strength = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        steps.append(T.RandomApply([T.ColorJitter(*strength)], p=jitter.prob))
    if cfg.photometric.prob:
        steps.append(Photometric(cfg.photometric.prob))
    if cfg.grayscale.prob:
        steps.append(T.RandomGrayscale(p=cfg.grayscale.prob))
    if cfg.gaussian_blur.prob:
        steps.append(T.RandomApply([host_data.GaussianBlur()], p=cfg.gaussian_blur.prob))
    if cfg.solarization.prob:
        steps.append(T.RandomApply([host_data.Solarization()], p=cfg.solarization.prob))
    if cfg.equalization.prob:
        steps.append(T.RandomApply([ImageOps.equalize], p=cfg.equalization.prob))
    if cfg.horizontal_flip.prob and cfg.get("grid") is None:  # a grid is mirrored as a whole
        steps.append(T.RandomHorizontalFlip(p=cfg.horizontal_flip.prob))
    mean, std = statistics(dataset, cfg)
    return [*steps, T.ToTensor(), T.Normalize(mean, std)]


def pretrain_transform(cfg: DictConfig) -> Any:
    """Build the transform that maps a PIL image to the list of all views of ``cfg.augmentations``.

    Raises:
        UserError: a folder of masks is missing.
    """
    views = []
    for view in cfg.augmentations:
        transform: Any = (stack_transform if is_stack(view) else view_transform)(cfg.data.dataset, view)
        background = remove_background(cfg, view)
        if background is not None:
            transform = T.Compose([background, transform])
        views.append(host_data.NCropAugmentation(transform, view.num_crops))
    pipeline = host_data.FullTransformPipeline(views)
    return T.Compose([pipeline, SharedFlip(cfg.shared_flip)]) if cfg.get("shared_flip") else pipeline


def remove_background(cfg: DictConfig, view: Any) -> RemoveBackground | None:
    """Build the step ``masks`` of an entry of ``augmentations``; None if the entry does not have it."""
    if not has_masks(view):
        return None
    masks = view.masks
    return RemoveBackground(masks.folder, cfg.data.train_path, prob=masks.prob, fill=masks.fill)


def evaluation_transform(dataset: str, crop_size: int | None = None, cfg: Any = None) -> T.Compose:
    """Build the evaluation transform. Its images have the size of the training images.

    Args:
        dataset: name of the dataset.
        crop_size: side of the training images in pixels; None means that of the dataset. Images are resized to this
            size times a ratio, which is 256/224 for ImageNet and custom data and 1 for other datasets, and cropped.
        cfg: a section with ``mean`` and ``std``, for custom data, or with ``eval_steps``, which are the transform.
    """
    if cfg is not None and cfg.get("eval_steps") is not None:
        return build_steps(_plain(cfg["eval_steps"]))
    info = DATASETS[dataset]
    side = crop_size or info.side
    margin = 256 / 224 if dataset == "custom" else info.resize[0] / info.resize[1] if info.resize else 1
    # images of CIFAR and digits already have this size
    unchanged = info.resize is None and dataset != "custom" and side == info.side
    steps: list[Any] = [] if unchanged else [T.Resize(round(side * margin)), T.CenterCrop(side)]
    return T.Compose([*steps, T.ToTensor(), T.Normalize(*statistics(dataset, cfg))])


def evaluation_of_pretraining(cfg: DictConfig) -> T.Compose:
    """Build the evaluation transform of a pre-training, whose images have the size of its first view.

    Args:
        cfg: the validated configuration.
    """
    view, dataset = cfg.augmentations[0], cfg.data.dataset
    return evaluation_transform(dataset, evaluation_side(view, dataset), view)


class LinearCrop(NamedTuple):
    """The training augmentation of a linear evaluation: a random crop and, for some datasets, a flip.

    Args:
        side: side of the crop, in pixels.
        min_scale: smallest crop, as a fraction of the image's area.
        flip: whether half of the images are flipped horizontally.
        mean, std: mean and standard deviation of each channel.
    """

    side: int
    min_scale: float
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


def linear_crop(dataset: str, cfg: DictConfig) -> LinearCrop:
    """Read ``crop_size`` (pixels) and ``crop_min_scale`` (fraction of the area) of ``data.augmentations``."""
    info, given = DATASETS[dataset], cfg.data.get("augmentations") or {}
    side, min_scale = given.get("crop_size", info.side), given.get("crop_min_scale", 0.08)
    return LinearCrop(side, min_scale, info.flip, *statistics(dataset, given))


def linear_transform(dataset: str, cfg: DictConfig) -> Any:
    """Build the training transform of a linear evaluation; ``auto_augment`` adds timm's RandAugment and erasing."""
    crop = linear_crop(dataset, cfg)
    if cfg.get("auto_augment"):
        from timm.data import create_transform

        return create_transform(
            input_size=crop.side,
            is_training=True,
            scale=(crop.min_scale, 1.0),
            hflip=0.5 if crop.flip else 0.0,
            color_jitter=None,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            re_prob=0.25,
            re_mode="pixel",
            mean=crop.mean,
            std=crop.std,
        )
    flip = [T.RandomHorizontalFlip()] if crop.flip else []
    random_crop = T.RandomResizedCrop(crop.side, scale=(crop.min_scale, 1.0))
    return T.Compose([random_crop, *flip, T.ToTensor(), T.Normalize(crop.mean, crop.std)])
