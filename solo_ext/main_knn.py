"""k-nearest-neighbour evaluation of a checkpoint: ``python -m solo_ext.main_knn``, options as solo-learn's."""

import argparse
from pathlib import Path
from typing import Any

from solo_ext.errors import UserError, exit_on_user_error


def _positive(kind: type) -> Any:
    def positive(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return positive


def parser() -> argparse.ArgumentParser:
    """The command line: solo-learn's options, and ``--device`` and ``--output``."""
    found = argparse.ArgumentParser(
        prog="python -m solo_ext.main_knn",
        description="Weighted k-nearest-neighbour accuracy of a pre-trained backbone or its projector.",
    )
    add = found.add_argument
    add("--pretrained_checkpoint_dir", required=True, help="folder of a run: args.json and a checkpoint")
    add("--dataset", required=True, help="cifar10, cifar100, stl10, imagenet, imagenet100, custom or digits")
    add("--train_data_path", required=True, help="folder of the labelled images that vote")
    add("--val_data_path", required=True, help="folder of the images that are classified")
    add("--data_format", default="image_folder", choices=["image_folder"])
    add("--batch_size", type=_positive(int), default=256)
    add("--num_workers", type=int, default=2)
    add("--k", type=_positive(int), nargs="+", default=[20], help="numbers of neighbours")
    add("--temperature", type=_positive(float), nargs="+", default=[0.07], help="for the cosine")
    add("--distance_function", nargs="+", default=["cosine"], choices=["cosine", "euclidean"])
    add("--feature_type", nargs="+", default=["backbone"], choices=["backbone", "projector"])
    add("--device", default=None, help="cpu, cuda, …; a GPU if there is one")
    add("--output", type=Path, default=None, help="write the accuracies to this JSON file too")
    return found


def evaluate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every combination of feature, k, distance and temperature.

    Returns:
        A list of {feature_type, k, distance_function, temperature, acc1, acc5}; accuracies in per cent.

    Raises:
        UserError: a path or a checkpoint is wrong.
    """
    import json

    import torch
    from tqdm import tqdm

    from solo_ext.checkpoint import ARGS, find_checkpoint
    from solo_ext.data import DATASETS, check_same_classes, evaluation_loader, evaluation_transform, image_dataset
    from solo_ext.knn import WeightedKNNClassifier
    from solo_ext.logs import write_json

    folder = Path(args.pretrained_checkpoint_dir)
    if not (folder / ARGS).is_file():
        raise UserError(f"{folder} is no folder of a run: it has no {ARGS}")
    if args.dataset not in DATASETS:
        raise UserError(f"unknown --dataset {args.dataset!r}; choose from {', '.join(sorted(DATASETS))}")
    config = json.loads((folder / ARGS).read_text())
    if not {"backbone", "data"} <= set(config):
        raise UserError(f"{folder / ARGS} is not of a run of solo-learn: it names no backbone and no data")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from None
    view = (config.get("augmentations") or [config["data"].get("augmentations") or {}])[0]
    crop_size = view.get("crop_size", 224)
    networks = _networks(find_checkpoint(folder), config, crop_size, args.feature_type, device)
    transform = evaluation_transform(args.dataset, crop_size, view)

    images: dict[str, Any] = {}
    for split, path in (("train", args.train_data_path), ("val", args.val_data_path)):
        if args.dataset not in ("cifar10", "cifar100", "stl10") and not Path(path).is_dir():
            raise UserError(f"--{split}_data_path is no folder: {path}")
        images[split] = image_dataset(args.dataset, path, split, transform, indexed=False, no_labels=False)
    check_same_classes(images["train"], images["val"])
    features: dict[str, dict[str, Any]] = {}
    for split, dataset in images.items():
        loader = evaluation_loader(dataset, args.batch_size, args.num_workers)
        features[split] = _features(tqdm(loader, desc=split, disable=None), networks, device)

    results = []
    for kind in args.feature_type:
        for k in args.k:
            for distance in args.distance_function:
                for temperature in args.temperature if distance == "cosine" else [None]:
                    knn = WeightedKNNClassifier(k=k, T=temperature or 1.0, distance_fx=distance)
                    knn(*(features["train"][name] for name in (kind, "labels")))
                    knn(test_features=features["val"][kind], test_targets=features["val"]["labels"])
                    acc1, acc5 = knn.compute()
                    row = {"feature_type": kind, "k": k, "distance_function": distance, "temperature": temperature}
                    results.append({**row, "acc1": acc1, "acc5": acc5})
                    print(f"{kind}  k {k}  {distance}  T {temperature}:  acc@1 {acc1:.2f} %  acc@5 {acc5:.2f} %")
    if args.output is not None:
        write_json(args.output, results)
    return results


def _networks(
    checkpoint: Path, config: dict[str, Any], crop_size: int, kinds: list[str], device: Any
) -> dict[str, Any]:
    """Backbone and, where asked for, projector of a checkpoint."""
    from omegaconf import OmegaConf

    from solo_ext.backbones import build_backbone
    from solo_ext.checkpoint import load_backbone, read_checkpoint
    from solo_ext.registry import method_class

    wanted = config["backbone"]
    backbone = build_backbone(wanted["name"], wanted.get("kwargs") or {}, config["data"]["dataset"], crop_size)
    load_backbone(checkpoint, backbone)
    networks = {"backbone": backbone}
    if "projector" in kinds:
        cfg = OmegaConf.create(config)
        model = method_class(cfg)(cfg) if "method" in cfg else None
        if getattr(model, "projector", None) is None:
            raise UserError(f"{checkpoint} has no projector; use --feature_type backbone")
        model.load_state_dict(read_checkpoint(checkpoint)["state_dict"], strict=False)
        networks["projector"] = model.projector
    return {name: network.to(device).eval() for name, network in networks.items()}


def _features(loader: Any, networks: dict[str, Any], device: Any) -> dict[str, Any]:
    """Features and labels of all images, on the CPU."""
    import torch

    found: dict[str, list[Any]] = {"labels": [], **{name: [] for name in networks}}
    with torch.no_grad():
        for images, labels in loader:
            feats = networks["backbone"](images.to(device))
            found["labels"].append(labels)
            found["backbone"].append(feats.cpu())
            if "projector" in networks:
                found["projector"].append(networks["projector"](feats).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def main() -> None:
    """The command."""
    from solo_ext.launch import quieten

    args = parser().parse_args()
    quieten()
    with exit_on_user_error():
        evaluate(args)


if __name__ == "__main__":
    main()
