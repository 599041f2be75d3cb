"""Train a method with PyTorch Lightning on several processes or GPUs.

    python lightly_ext/examples/lightning_distributed.py --steps 200 --devices 2

Needed: pip install ".[lightly]", in a clone of ssl-plugins. The images are scikit-learn's digits unless
--data names a folder.
The LightningModule is that of lightning_module.py. The losses join the rows of all processes. Batch norm does so with
sync_batchnorm, which needs GPUs.
"""

import pytorch_lightning as pl
import torch

from lightly_ext.examples import common
from lightly_ext.examples.lightning_module import Module
from plugins.tools.command import exit_on_user_error, positive_number, print_on_rank_zero

METHOD = "isoloss"


def main(given: list[str] | None = None) -> None:
    """Train, and print the kNN accuracy of the untrained and of the trained backbone."""
    gpus = torch.cuda.device_count()
    devices = {
        "type": positive_number(int),
        "default": gpus or 2,
        "help": "GPUs, or processes on a machine without GPU",
    }
    args = common.arguments("Train a method on several processes or GPUs.", METHOD, given, devices=devices)
    module = Module(args.method)
    print_on_rank_zero(f"kNN untrained: {common.knn(module.model, args.data):.2f}")
    trainer = pl.Trainer(
        max_steps=args.steps,
        devices=args.devices,
        strategy="ddp",
        sync_batchnorm=gpus > 0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, common.views(args.data))
    print_on_rank_zero(f"kNN trained: {common.knn(module.model, args.data):.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
