"""Evaluate a backbone with lightly's classifiers: kNN, linear evaluation and fine-tuning."""

from pathlib import Path

from lightly.utils.benchmarking import FinetuneClassifier, KNNClassifier, LinearClassifier, MetricCallback
from pytorch_lightning import LightningModule

from lightly_ext.benchmarks.setup import Setup
from lightly_ext.benchmarks.trainer import trainer
from plugins.spelling import counted
from plugins.tools.command import print_on_rank_zero


def evaluate(setup: Setup, model: LightningModule, folder: Path) -> dict[str, dict[str, float]]:
    """Evaluate a model.

    Args:
        setup: the options; they select the evaluations.
        model: model with a trained backbone; fine-tuning, the last evaluation, changes the backbone.
        folder: folder of the method.

    Returns:
        {"knn", "linear", "finetune": {"top1", "top5": accuracy in [0, 1]}}, each after the last epoch.
    """
    options, found = setup.options, {}
    if not options.skip_knn_eval:
        found["knn"] = _knn(setup, model, folder)
    if not options.skip_linear_eval:
        training = options.linear_epochs, options.linear_lr
        found["linear"] = _classify(setup, LinearClassifier, model, folder, "linear", *training)
    if not options.skip_finetune_eval:
        training = options.finetune_epochs, options.finetune_lr
        found["finetune"] = _classify(setup, FinetuneClassifier, model, folder, "finetune", *training)
    return found


def _knn(setup: Setup, model: LightningModule, folder: Path) -> dict[str, float]:
    options, metrics = setup.options, MetricCallback()
    classifier = KNNClassifier(
        model,
        num_classes=len(setup.classes),
        knn_k=options.knn_k,
        knn_t=options.knn_t,
        train_dataloader_idx=0,
        val_dataloader_idx=1,
        topk=setup.topk,
    )
    train = setup.loader(options.train_dir, setup.plain())
    loaders = [train, setup.loader(options.val_dir, setup.plain(), held_out=True)]
    trainer(options, folder / "knn", 1, [metrics]).validate(classifier, loaders, verbose=False)
    values = {name.partition("/")[0]: history[-1] for name, history in metrics.val_metrics.items()}
    return {f"top{k}": values[f"val_knn_top{k}"] for k in setup.topk}


def _classify(
    setup: Setup, kind: type, model: LightningModule, folder: Path, name: str, epochs: int, lr: float
) -> dict[str, float]:
    print_on_rank_zero(f"{folder.name}: {name} evaluation for {counted(epochs, 'epoch')}")
    options, metrics = setup.options, MetricCallback()
    classifier = kind(
        model,
        batch_size_per_device=options.batch_size_per_device,
        lr=lr,
        feature_dim=model.online_classifier.feature_dim,
        num_classes=len(setup.classes),
        topk=setup.topk,
    )
    model.train()  # lightly's linear evaluation sets evaluation mode, which fine-tuning must not use
    train = setup.loader(options.train_dir, setup.augmented(), shuffle=True)
    held_out = setup.loader(options.val_dir, setup.plain(), held_out=True)
    host = trainer(options, folder / name, epochs, [metrics], precision=options.precision)
    host.fit(classifier, train, held_out)
    return {f"top{k}": metrics.val_metrics[f"val_top{k}"][-1] for k in setup.topk}
