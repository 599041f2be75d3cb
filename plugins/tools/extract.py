"""Extract the features of images in class folders with a DISSL model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from plugins.tools.command import UserError
from plugins.tools.images import open_image
from plugins.tools.weights import preprocessor


def open_folders(train: Path, val: Path) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset]:
    """Open the training and validation images with the preprocessing of DISSL's evaluation.

    Args:
        train: folder with one subfolder per class.
        val: folder with the same subfolders.

    Returns:
        The two data sets.

    Raises:
        UserError: a folder is missing or empty, or the class folders differ.
    """
    from plugins.tools.folders import ImageFolder, check_same_classes

    found = []
    for folder in (train, val):
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        try:
            images = ImageFolder(str(folder), preprocessor(), loader=open_image)
        except FileNotFoundError as error:
            raise UserError(f"{folder} must hold a folder of images for each class: {error}") from None
        found.append(images)
    check_same_classes(train, found[0].classes, val, found[1].classes)
    return found[0], found[1]


@torch.no_grad()
def extract(
    model: nn.Module, images: torch.utils.data.Dataset, device: torch.device, *, batch: int, workers: int, title: str
) -> tuple[Tensor, Tensor]:
    """Compute the features of all images, in their order, with a progress bar.

    Args:
        model: a backbone in evaluation mode that returns ``[B, D]``.
        images: a data set of (image, label).
        device: device of the model.
        batch: batch size.
        workers: number of worker processes of the data loader.
        title: title of the progress bar.

    Returns:
        Features ``[N, D]`` and labels ``[N]`` on the CPU.

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
