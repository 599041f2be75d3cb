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
# # Pretrained weights: load, extract features, probe
#
# The authors of DISSL published seven ResNet-50s. `load_dissl("dissl_resnet50_dNone_e400_m6")`
# downloads one, stores its SHA-256 and returns a torchvision ResNet-50 that outputs features. This
# notebook also runs without a network: it then writes a file of the same layout with random weights,
# and prints a message. Accuracies of random weights are not those of DISSL.

# %%
import os
import tempfile
from pathlib import Path

import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from plugins.tools.command import UserError
from plugins.tools.weights import load_dissl

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## Load
#
# Set `DISSL_WEIGHTS` to one of the published names or to a file. `torch.hub.load(REPOSITORY, NAME)`
# gives the same model.


# %%
def stand_in():
    """Write a ResNet-18 in the layout of the published files: a flat dictionary without classifier."""
    model = torchvision.models.resnet18()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    path = Path(tempfile.mkdtemp()) / "dissl_stand_in.torch"
    torch.save(state, path)
    return path


source, published = os.environ.get("DISSL_WEIGHTS", ""), True
try:
    if not source:
        raise UserError("DISSL_WEIGHTS is not set")
    model = load_dissl(source)
except UserError as error:
    print(f"no published weights ({error}); using random weights in a file of the same layout")
    model, published = load_dissl(stand_in()), False
print(type(model).__name__, "with", sum(p.numel() for p in model.parameters()), "parameters")

# %% [markdown]
# ## Features
#
# `plugins.tools.weights.preprocessor()` is the preprocessing for photographs: 256 pixels, the central
# 224, ImageNet's mean and deviation. The digits here are only resized, which keeps the notebook fast.

# %%
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels[:600] / 16, dtype=torch.float32).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
images, labels = torch.nn.functional.interpolate(images, size=32, mode="bilinear"), labels[:600]
with torch.no_grad():
    features = torch.cat([model(batch) for batch in images.split(100)]).numpy()
print(features.shape)

# %% [markdown]
# ## Probe
#
# A linear classifier on frozen features. `python -m plugins.tools.linear_eval --weights NAME
# --train-dir … --val-dir …` fits the published grid of probes to images of your own.

# %%
mean, deviation = features[:400].mean(0), features[:400].std(0) + 1e-6
scaled = (features - mean) / deviation
accuracy = LogisticRegression(max_iter=1000).fit(scaled[:400], labels[:400]).score(scaled[400:], labels[400:])
chance = max((labels[400:] == digit).mean() for digit in range(10))
print(f"{'published' if published else 'random'} weights: {accuracy:.1%}, the most frequent digit alone: {chance:.1%}")
assert accuracy > chance + 0.3
