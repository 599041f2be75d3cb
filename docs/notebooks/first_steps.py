# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First steps
#
# Train a small network with IsoLoss on the 8 × 8 digits of scikit-learn, without labels, and evaluate
# its features. It runs in a few seconds on a CPU and needs no download.

# %%
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightly_ext.models import IsoLoss

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Data and views
#
# A self-supervised method compares two random views of each image. Here a view is turned, scaled,
# shifted and noisy.

# %%
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
order = torch.randperm(len(images))
train, test = order[:1297], order[1297:]


def view(batch):
    n = len(batch)
    angle, scale = 0.4 * (2 * torch.rand(n) - 1), 1 + 0.25 * (2 * torch.rand(n) - 1)
    shift = 0.3 * (2 * torch.rand(n, 2) - 1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, align_corners=False) + 0.1 * torch.randn_like(batch)


# %% [markdown]
# ## Model
#
# Any module that returns features is a backbone. `IsoLoss` adds projection head, predictor and
# teacher. For another method replace `IsoLoss` by its name: `SSLEY`, `DISSL`, `BYOL` and so on.

# %%
backbone = nn.Sequential(
    nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64), nn.BatchNorm1d(64), nn.ReLU()
)
model = IsoLoss(backbone, input_dim=64, proj_hidden_dim=256, proj_output_dim=64, rho=0.99)


def accuracy():
    """Accuracy of a linear probe that sees five labels per digit."""
    model.eval()
    with torch.no_grad():
        features = F.normalize(model(images)).numpy()
    model.train()
    few = [int(i) for digit in range(10) for i in [i for i in train if labels[i] == digit][:5]]
    return LogisticRegression(max_iter=2000).fit(features[few], labels[few]).score(features[test], labels[test])


before = accuracy()
print(f"untrained: {before:.1%}")

# %% [markdown]
# ## Training
#
# The loss alone does not show whether the method works: a constant embedding has loss 0. `z_std` is
# 1/√D = 0.125 for an isotropic embedding and 0 for a constant one.

# %%
optimizer = torch.optim.AdamW(model.training_parameters(), lr=2e-3, weight_decay=1e-2)
for step in range(240):
    batch = images[train[torch.randperm(len(train))[:256]]]
    views = [view(batch), view(batch)]
    loss = model.loss(views)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.update_momentum(0.99)
    if step % 60 == 59:
        with torch.no_grad():
            z_std = F.normalize(model.projection_head(model(views[0]))).std(0).mean()
        print(f"step {step + 1}: loss {loss.item():.3f}, z_std {z_std.item():.3f}")

# %%
after = accuracy()
print(f"untrained: {before:.1%}, trained: {after:.1%}")
assert after > before + 0.05

# %% [markdown]
# ## What next
#
# - `docs/choosing.md` compares the methods; `docs/methods/` has a page for each.
# - `docs/lightly.md`, `docs/solo.md` and `docs/vissl.md` train real networks in your framework.
