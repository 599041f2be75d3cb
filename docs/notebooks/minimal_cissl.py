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
# # A minimal CISSL
#
# CISSL (Dubois et al. 2022, arXiv:2209.06235) is contrastive learning with two heads: the softmax
# runs over the outputs of an MLP teacher head, the rows come from a linear student head, and a view
# is also a positive of itself. This notebook compares it with SimCLR, which is the same function with
# one head, on the 8 × 8 digits of scikit-learn.

# %%
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from plugins.losses import cissl_terms

torch.manual_seed(0)
torch.set_num_threads(1)
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
order = torch.randperm(len(images))
train, test = order[:1297], order[1297:]


def view(batch):
    """A random view: turned, scaled, shifted, noisy."""
    n = len(batch)
    angle, scale = 0.4 * (2 * torch.rand(n) - 1), 1 + 0.25 * (2 * torch.rand(n) - 1)
    shift = 0.3 * (2 * torch.rand(n, 2) - 1)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(batch.shape), align_corners=False)
    return F.grid_sample(batch, grid, align_corners=False) + 0.1 * torch.randn_like(batch)


def hidden(width_in, width_out):
    return nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out), nn.ReLU()


def probe(encoder):
    """Accuracy of a linear probe on frozen features of the test images."""
    encoder.eval()
    with torch.no_grad():
        features = encoder(images).numpy()
    encoder.train()
    classifier = LogisticRegression(max_iter=2000).fit(features[train], labels[train])
    return classifier.score(features[test], labels[test])


# %% [markdown]
# ## Training
#
# `I_q_zm` is a lower bound of the mutual information between embedding and image, in nats. It rises
# from 0 to at most the logarithm of the number of columns minus log 2.


# %%
def train_encoder(simclr, steps=150):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), *hidden(64, 256), *hidden(256, 64))
    teacher = nn.Sequential(*hidden(64, 256), nn.Linear(256, 64), nn.BatchNorm1d(64))
    student = teacher if simclr else nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
    untrained = probe(encoder)
    parameters = {id(p): p for module in (encoder, teacher, student) for p in module.parameters()}.values()
    optimizer = torch.optim.Adam(parameters, lr=2e-3, weight_decay=1e-6)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = images[train[torch.randperm(len(train))[:256]]]
        z = encoder(torch.cat([view(batch), view(batch)]))
        rows, columns = student(z).chunk(2), teacher(z).chunk(2)
        terms = cissl_terms(rows, columns, positives="other" if simclr else "all")
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {terms.loss:.2f}, I_q_zm {terms.I_q_zm:.2f} nats")
    return untrained, probe(encoder), terms


# %%
untrained, cissl, terms = train_encoder(simclr=False)

# %%
_, simclr, _ = train_encoder(simclr=True)

# %% [markdown]
# ## Result
#
# In this small example the two methods differ by no more than two seeds of one method. The loss of
# CISSL is at least log 2, because a view is one of its own two positives.

# %%
print(f"linear probe: untrained {untrained:.1%}, CISSL {cissl:.1%}, SimCLR {simclr:.1%}")
assert min(cissl, simclr) > untrained + 0.03
assert terms.loss > math.log(2)
