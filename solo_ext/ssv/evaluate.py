"""The tasks ``linear_eval`` and ``get_features`` of main.py: features of a trained network, and their evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from plugins.tools.command import UserError
from plugins.tools.features import usable_device
from plugins.tools.files import atomic
from plugins.tools.knn import knn_accuracy
from plugins.tools.neighbors import neighbor_consistency
from plugins.tools.probe import Probe, Setting, evaluate_probe
from plugins.tools.records import write_json
from solo_ext.checkpoint import check_writable
from solo_ext.config import parse_pretrain
from solo_ext.data import evaluated_images
from solo_ext.features import collect
from solo_ext.launch import as_user_error, seed_everything
from solo_ext.registry import method_class, register
from solo_ext.ssv.arguments import Arguments
from solo_ext.ssv.checkpoints import load_network
from solo_ext.ssv.metrics import LOG, K, outputs
from solo_ext.ssv.translate import run_folder, translate

RESULT = "linear_eval.json"
WEIGHT_DECAY = 1e-6
"""Of the linear classifier; its optimiser is SGD with momentum 0.9, its learning rate decreases to 0 by a cosine."""
TEMPERATURE = 0.07
"""Of the votes of the nearest neighbours."""

Side = dict[str, Tensor]
"""Outputs of some images by name, as :func:`solo_ext.ssv.metrics.outputs` returns them, and "labels"."""


def get_features(args: Arguments) -> None:
    """Write the features of all images as evaluated: {train,test}_fvecs.npy, float32 [N, D], {train,test}_gt.npy [N].

    The features are the output of the head that the original evaluates; see :func:`solo_ext.ssv.metrics.outputs`. Rows
    are in the order of the data set.

    Args:
        args: the arguments; ``load`` is the trained network, ``output`` names the folder of the files.

    Raises:
        UserError: an argument, the data or the checkpoint is invalid.
    """
    folder, sides = _evaluated(args)
    for split, side in sides.items():
        for name, rows in (("fvecs", side["head"].float()), ("gt", side["labels"])):
            with atomic(folder / f"{split}_{name}.npy") as file:
                np.save(file, rows.numpy())
    count, width = sides["train"]["head"].shape
    print(
        f"wrote the features of {count} training and {len(sides['test']['head'])} test images, {width} wide: {folder}"
    )


def linear_eval(args: Arguments) -> dict[str, Any]:
    """Evaluate a trained network in evaluation mode, and write linear_eval.json.

    Args:
        args: the arguments; ``load`` is the trained network, ``output`` names the folder of the file.

    Returns:
        "neighbors", the neighbour consistency of the test images with 20 neighbours; "knn", the accuracy of their
        weighted classification by the 20 nearest training images; "linear", that of a linear classifier after its last
        epoch. Each is a dict with "head" and "trunk", in per cent. "checkpoint" and "settings" say of what.

    Raises:
        UserError: an argument, the data or the checkpoint is invalid.
    """
    chosen = args.document["linear_eval"]
    setting = Setting(weight_decay=WEIGHT_DECAY, lr=chosen["lr"])
    probe = Probe(grid=(setting,), epochs=chosen["epochs"], batch_size=chosen["batch_size"])
    try:
        probe.check()
    except ValueError as error:
        raise UserError(f"linear_eval: {error}") from None
    folder, sides = _evaluated(args)
    train, test = sides.values()
    device = usable_device(None)
    found: dict[str, dict[str, float]] = {"neighbors": {}, "knn": {}, "linear": {}}
    for name in ("head", "trunk"):
        of_train, of_test = ((side[name].float().to(device), side["labels"].to(device)) for side in (train, test))
        found["neighbors"][name] = 100 * neighbor_consistency(*of_test, K)
        found["knn"][name] = knn_accuracy(*of_train, *of_test, k=K, temperature=TEMPERATURE)[0]
        found["linear"][name] = evaluate_probe(of_train, of_test, probe)["acc1"]
    for title, values in zip(
        (f"neighbour consistency at {K}", f"weighted kNN, k {K}", "linear classifier"), found.values(), strict=True
    ):
        print(f"{title}: head {values['head']:.2f} %  trunk {values['trunk']:.2f} %", flush=True)
    with (folder / LOG).open("a") as file:
        file.write(f"[INFO] Test linear eval accuracy: {found['linear']['head'] / 100:.4f}\n")
    result = {"checkpoint": str(args.load), "settings": {**setting._asdict(), **chosen}, **found}
    write_json(folder / RESULT, result)
    print(f"wrote {folder / RESULT}", flush=True)
    return result


def _evaluated(args: Arguments) -> tuple[Path, dict[str, Side]]:
    """Return the folder of the results, and the outputs of the training and of the test images."""
    if args.load is None:
        raise UserError("give the folder of a trained network with --load")
    folder = run_folder(args.algo, args.arch, args.output)
    register()
    cfg = parse_pretrain(translate(args.document, args.algo, args.arch, output=args.output))
    seed_everything(cfg.seed)
    with as_user_error("the method"):
        method = method_class(cfg)(cfg)
    print(f"loaded {load_network(args.load, args.algo, method)}", flush=True)
    sets = dict(zip(("train", "test"), evaluated_images(cfg), strict=True))
    check_writable(folder, "--output")
    device = usable_device(None)
    method.to(device).eval()
    reading = {"batch_size": cfg.optimizer.batch_size, "workers": cfg.data.num_workers}
    return folder, {
        split: collect(images, outputs(method), device, **reading, title=split) for split, images in sets.items()
    }
