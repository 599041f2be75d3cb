# SSL-EY in plain PyTorch.
#
# Needed: pip install lightly, and this package. The images of the example are those of
#   python -m plugins.tools.data digits
# but any folder of images will do. Settings are small, to run anywhere; they are not those of the paper,
# Chapman, Wells and Lawry Aguila 2024, arXiv:2310.01012.

import torch
import torchvision
from lightly.data import LightlyDataset
from torch import nn

from lightly_ext.models import SSLEY
from lightly_ext.transforms import SSLEYTransform

resnet = torchvision.models.resnet18()
backbone = nn.Sequential(*list(resnet.children())[:-1])
model = SSLEY(backbone)

device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)

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

# all parameters but the teacher's, where there is one
optimizer = torch.optim.AdamW(model.training_parameters(), lr=3e-4)

print("Starting Training")
for epoch in range(epochs):
    total_loss = 0
    for batch in dataloader:
        views = [view.to(device) for view in batch[0]]
        loss = model.loss(views)
        total_loss += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    avg_loss = total_loss / len(dataloader)
    print(f"epoch: {epoch:>02}, loss: {avg_loss:.5f}")
