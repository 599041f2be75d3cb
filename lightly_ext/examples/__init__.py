"""Three scripts to start from, one for each of lightly's dialects; METHOD, their first setting, names the method.

=========================  ===================================================
plain_pytorch.py           a training loop in plain PyTorch
lightning_module.py        a LightningModule for PyTorch Lightning
lightning_distributed.py   the same on several processes or GPUs
=========================  ===================================================

``common.py`` has what is not about the method: command line, images, network and kNN accuracy.
"""
