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
# # A minimal DISSL
#
# DISSL (Dubois et al. 2022, arXiv:2209.06235) assigns every view to one of C classes with a teacher
# head and trains a student head, of the form of the later probe, to predict the class of the other
# views. This notebook is the whole method on the 8 × 8 digits of scikit-learn: encoder, two heads,
# one loss.

# %%
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from plugins.losses import dissl_terms

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
# ## Encoder and heads
#
# The student head is linear because the probe will be linear. The teacher head is an MLP. Both use
# the same encoder, and gradients flow through both.

# %%
CLASSES = 256
encoder = nn.Sequential(nn.Flatten(), *hidden(64, 256), *hidden(256, 64))
teacher = nn.Sequential(*hidden(64, 256), nn.Linear(256, CLASSES))
student = nn.Linear(64, CLASSES)
before = probe(encoder)

# %% [markdown]
# ## Training
#
# `H_Mlz`, the entropy of one assignment, starts at log C and has to fall. `H_M`, the entropy of the
# mean assignment, has to stay near log C: all classes are used. If `H_Mlz` stays at log C, the run
# has stalled.

# %%
steps = 200
parameters = [p for module in (encoder, teacher, student) for p in module.parameters()]
optimizer = torch.optim.Adam(parameters, lr=2e-3, weight_decay=1e-6)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
print(f"log C = {math.log(CLASSES):.2f}")
for step in range(steps):
    batch = images[train[torch.randperm(len(train))[:256]]]
    z = encoder(torch.cat([view(batch), view(batch)]))
    terms = dissl_terms(teacher(z).chunk(2), student(z).chunk(2), lambda_maximality=2.3, beta_det_inv=0.8)
    optimizer.zero_grad()
    terms.loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {terms.loss:.2f}, H_M {terms.H_M:.2f}, H_Mlz {terms.H_Mlz:.2f}")

# %% [markdown]
# ## Result

# %%
after = probe(encoder)
print(f"linear probe: untrained {before:.1%}, DISSL {after:.1%}")
assert after > before + 0.03
assert terms.H_Mlz < 0.8 * math.log(CLASSES) < terms.H_M
