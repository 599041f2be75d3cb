"""Writes the examples: ``python -m lightly_ext.examples.generate``. A test keeps the files as this writes them."""

from pathlib import Path

from lightly_ext.names import CLASS_NAMES
from plugins.spec import MethodSpec

_HEAD = """\
# {title} in {host}.
#
# Needed: pip install lightly, and this package. The images of the example are those of
#   python -m plugins.tools.data digits
# but any folder of images will do. Settings are small, to run anywhere; they are not those of the paper,
# {reference}.

"""

_BACKBONE = """\
resnet = torchvision.models.resnet18()
backbone = nn.Sequential(*list(resnet.children())[:-1])
"""

_DATA = """\
transform = {name}Transform(input_size=32)
dataset = LightlyDataset("datasets/digits/train", transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=256,
    shuffle=True,
    drop_last=True,
    num_workers=8,
)
epochs = 10
"""

_PYTORCH = """\
import torch
import torchvision
from lightly.data import LightlyDataset
{schedule}from torch import nn

from lightly_ext.models import {name}
{transform}

{backbone}model = {name}(backbone)

device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)

{data}{steps}
# all parameters but the teacher's, where there is one
{optimizer}

print("Starting Training")
for epoch in range(epochs):
    total_loss = 0
    for {counter} in {loop}:
        views = [view.to(device) for view in batch[0]]
        loss = model.loss(views)
        total_loss += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
{momentum}    avg_loss = total_loss / len(dataloader)
    print(f"epoch: {{epoch:>02}}, loss: {{avg_loss:.5f}}")
"""

_PYTORCH_MOMENTUM = """\
        # the teacher follows after each step
        step = epoch * len(dataloader) + batch_idx
        model.update_momentum(cosine_schedule(step, max_steps, 0.99, 1))
"""

_LIGHTNING = """\
import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
{schedule}from torch import nn

from lightly_ext.models import {name}
{transform}


class {name}Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
{backbone}        self.model = {name}(backbone)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = self.model.loss(batch[0])
        self.log("train_loss", loss)
        return loss
{momentum}
    def configure_optimizers(self):
        # all parameters but the teacher's, where there is one
        return {optimizer}


model = {name}Module()

{data}
{trainer}trainer.fit(model=model, train_dataloaders=dataloader)
"""

_OPTIMIZER = "torch.optim.SGD({parameters}, lr=0.06)"
_OPTIMIZERS = {"SSLEY": "torch.optim.AdamW({parameters}, lr=3e-4)"}
"""SSL-EY's loss grows as the fourth power of the embedding, which nothing normalises: SGD at that rate gives NaN within
three steps. The steps of AdamW, and of the published LARS, do not depend on the size of the gradient."""

_LIGHTNING_MOMENTUM = """
    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        # the teacher follows after each step, however many batches that accumulates
        max_steps = self.trainer.estimated_stepping_batches
        self.model.update_momentum(cosine_schedule(self.global_step, max_steps, 0.99, 1))
"""

_ONE_DEVICE = """\
accelerator = "gpu" if torch.cuda.is_available() else "cpu"

trainer = pl.Trainer(max_epochs=epochs, devices=1, accelerator=accelerator)
"""

_DISTRIBUTED = """\
# The losses of this package join the rows of all devices by themselves. Batch norm has to be told to.
trainer = pl.Trainer(
    max_epochs=epochs,
    devices="auto",
    accelerator="gpu",
    strategy="ddp",
    sync_batchnorm=True,
    use_distributed_sampler=True,
)
"""

_HOSTS = {
    "pytorch": "plain PyTorch",
    "pytorch_lightning": "PyTorch Lightning",
    "pytorch_lightning_distributed": "PyTorch Lightning, on several devices",
}


def examples() -> dict[str, str]:
    """All examples: path below this folder → text."""
    return {
        f"{dialect}/{spec.name}.py": _example(dialect, name, spec)
        for name, spec in CLASS_NAMES.items()
        for dialect in _HOSTS
    }


def _example(dialect: str, name: str, spec: MethodSpec) -> str:
    parts = {
        "name": name,
        "backbone": _BACKBONE,
        "data": _DATA.format(name=name),
        "schedule": "from lightly.utils.scheduler import cosine_schedule\n" if spec.teacher else "",
        "transform": f"from lightly_ext.transforms import {name}Transform",
    }
    if name in ("BYOL",):  # lightly's own has an argument for each view, and none for both
        parts["transform"] = "from lightly_ext.transforms import TwoViewTransform"
        parts["data"] = parts["data"].replace(f"{name}Transform", "TwoViewTransform")
    optimizer = _OPTIMIZERS.get(name, _OPTIMIZER)
    head = _HEAD.format(title=spec.title, host=_HOSTS[dialect], reference=spec.reference)
    if dialect == "pytorch":
        parts["optimizer"] = "optimizer = " + optimizer.format(parameters="model.training_parameters()")
        teacher = {
            "steps": "max_steps = epochs * len(dataloader)\n",
            "counter": "batch_idx, batch",
            "loop": "enumerate(dataloader)",
            "momentum": _PYTORCH_MOMENTUM,
        }
        none = {"steps": "", "counter": "batch", "loop": "dataloader", "momentum": ""}
        return head + _PYTORCH.format(**parts, **(teacher if spec.teacher else none))
    parts["optimizer"] = optimizer.format(parameters="self.model.training_parameters()")
    parts["backbone"] = "".join(f"        {line}\n" for line in _BACKBONE.splitlines())
    parts["momentum"] = _LIGHTNING_MOMENTUM if spec.teacher else ""
    parts["trainer"] = _ONE_DEVICE if dialect == "pytorch_lightning" else _DISTRIBUTED
    return head + _LIGHTNING.format(**parts)


def main() -> None:
    """Write them beside this file."""
    folder = Path(__file__).parent
    for path, text in examples().items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text)


if __name__ == "__main__":
    main()
