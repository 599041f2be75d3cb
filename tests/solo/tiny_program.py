"""Run the command that TINY_PROGRAM names, as ``python -m`` would, with the backbone "tiny" added."""

import os

from plugins.testing import tiny_backbone
from solo_ext import main_linear, main_pretrain
from solo_ext.architectures import ARCHITECTURES

ARCHITECTURES["tiny"] = tiny_backbone

if __name__ == "__main__":
    main = {"pretrain": main_pretrain.main, "linear": main_linear.main}[os.environ["TINY_PROGRAM"]]
    main()
