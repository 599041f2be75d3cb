"""Features of images in class folders, by a file of DISSL's weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

from plugins.tools.command import UserError
from plugins.tools.images import open_image
from plugins.tools.weights import preprocessor


def open_folders(train: Path, val: Path) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
    """The images of two folders with a folder for each class, as DISSL's models are evaluated on them.

    Raises:
        UserError: a folder is missing or empty, or the two have other classes.
    """
    from plugins.tools.folders import ImageFolder

    found = []
    for folder in (train, val):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        try:
            images = ImageFolder(str(folder), preprocessor(), loader=open_image)
        except FileNotFoundError as error:
            raise UserError(f"{folder} must hold a folder of images for each class: {error}") from None
        found.append(images)
    alone = sorted(set(found[0].classes) ^ set(found[1].classes))
    if alone:
        raise UserError(f"{train} and {val} have different class folders: only one of them has {', '.join(alone[:5])}")
    return found[0], found[1]


@torch.no_grad()
def extract(
    model: nn.Module, images: torch.utils.data.Dataset, device: torch.device, *, batch: int, workers: int, title: str
) -> tuple[Tensor, Tensor]:
    """Features and labels of all images, in their order, on the CPU, with a progress bar.

    Args:
        model: gives ``[B, D]``, in evaluation mode.
        images: of (image, label).
        device: where the model computes.
        batch: images at a time.
        workers: processes that read images.
        title: of the progress bar.

    Raises:
        UserError: an image cannot be read.
    """
    from tqdm import tqdm

    loader = torch.utils.data.DataLoader(images, batch_size=batch, num_workers=workers)
    model.to(device)
    rows, labels = [], []
    for views, targets in tqdm(loader, desc=title, disable=None):
        rows.append(model(views.to(device)).float().cpu())
        labels.append(targets)
    return torch.cat(rows), torch.cat(labels)
