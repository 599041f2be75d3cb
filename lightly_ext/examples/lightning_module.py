"""Train a method with PyTorch Lightning.

    python lightly_ext/examples/lightning_module.py --steps 200

Needed: pip install ".[lightly]", in a clone of ssl-plugins. The images are scikit-learn's digits unless
--data names a folder.
"""

import pytorch_lightning as pl
import torch
from lightly.utils.scheduler import cosine_schedule

from lightly_ext.examples import common
from plugins.tools.command import exit_on_user_error

METHOD = "isoloss"


class Module(pl.LightningModule):
    """A method's model, its optimiser, and its life cycle."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method
        self.model = common.build(method)

    def on_train_start(self) -> None:
        """Allocate the memory of the images, if the method has one."""
        self.model.allocate(len(self.trainer.train_dataloader.dataset))

    def on_train_epoch_start(self) -> None:
        """Start an epoch of the method."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        self.model.start_epoch(self.current_epoch, self.trainer.train_dataloader, optimizer)

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        """Compute the method's loss."""
        views, _, index = batch
        loss = self.model.loss(views, index)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Freeze parameters, if the method does so."""
        self.model.after_backward()

    def optimizer_step(self, *args, **kwargs) -> None:
        """Step, and move the teacher: once, however many batches the step accumulates."""
        super().optimizer_step(*args, **kwargs)
        steps = self.trainer.estimated_stepping_batches
        self.model.update_momentum(cosine_schedule(self.global_step, steps, 0.99, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train all parameters except the teacher's."""
        return common.optimizer(self.method, self.model.training_parameters())


def main(given: list[str] | None = None) -> None:
    """Train, and print the kNN accuracy of the untrained and of the trained backbone."""
    args = common.arguments("Train a method with PyTorch Lightning.", METHOD, given)
    module = Module(args.method)
    print(f"kNN untrained: {common.knn(module.model, args.data):.2f}")
    trainer = pl.Trainer(
        max_steps=args.steps,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, common.views(args.data))
    print(f"kNN trained: {common.knn(module.model, args.data):.2f}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
