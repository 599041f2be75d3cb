# Matrix-SSL in plain PyTorch.
#
# Needed: pip install lightly, and this package. The images of the example are those of
#   python -m plugins.tools.data digits
# but any folder of images will do. Settings are small, to run anywhere; they are not those of the paper,
# Zhang, Tan, Yang, Huang and Yuan 2024, arXiv:2305.17326.

import torch
import torchvision
from lightly.data import LightlyDataset
from lightly.utils.scheduler import cosine_schedule
from torch import nn

from lightly_ext.models import MatrixSSL
from lightly_ext.transforms import MatrixSSLTransform

resnet = torchvision.models.resnet18()
backbone = nn.Sequential(*list(resnet.children())[:-1])
model = MatrixSSL(backbone)

device = "cuda" if torch.cuda.is_available() else "cpu"
model.to(device)

transform = MatrixSSLTransform(input_size=32)
dataset = LightlyDataset("datasets/digits/train", transform=transform)
dataloader = torch.utils.data.DataLoader(
    dataset,
    batch_size=256,
    shuffle=True,
    drop_last=True,
    num_workers=8,
)
epochs = 10
max_steps = epochs * len(dataloader)

# all parameters but the teacher's, where there is one
optimizer = torch.optim.SGD(model.training_parameters(), lr=0.06)

print("Starting Training")
for epoch in range(epochs):
    total_loss = 0
    for batch_idx, batch in enumerate(dataloader):
        views = [view.to(device) for view in batch[0]]
        loss = model.loss(views)
        total_loss += loss.detach()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # the teacher follows after each step
        step = epoch * len(dataloader) + batch_idx
        model.update_momentum(cosine_schedule(step, max_steps, 0.99, 1))
    avg_loss = total_loss / len(dataloader)
    print(f"epoch: {epoch:>02}, loss: {avg_loss:.5f}")
