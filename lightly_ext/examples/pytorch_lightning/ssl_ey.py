# SSL-EY in PyTorch Lightning.
#
# Needed: pip install lightly, and this package. The images of the example are those of
#   python -m plugins.tools.data digits
# but any folder of images will do. Settings are small, to run anywhere; they are not those of the paper,
# Chapman, Wells and Lawry Aguila 2024, arXiv:2310.01012.

import pytorch_lightning as pl
import torch
import torchvision
from lightly.data import LightlyDataset
from torch import nn

from lightly_ext.models import SSLEY
from lightly_ext.transforms import SSLEYTransform


class SSLEYModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        resnet = torchvision.models.resnet18()
        backbone = nn.Sequential(*list(resnet.children())[:-1])
        self.model = SSLEY(backbone)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = self.model.loss(batch[0])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        # all parameters but the teacher's, where there is one
        return torch.optim.AdamW(self.model.training_parameters(), lr=3e-4)


model = SSLEYModule()

transform = SSLEYTransform(input_size=32)
dataset = LightlyDataset("datasets/digits/train", transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=256,
    shuffle=True,
    drop_last=True,
    num_workers=8,
)
epochs = 10

accelerator = "gpu" if torch.cuda.is_available() else "cpu"

trainer = pl.Trainer(max_epochs=epochs, devices=1, accelerator=accelerator)
trainer.fit(model=model, train_dataloaders=dataloader)
