"""Train the methods of ``plugins`` with solo-learn's data loading, training loop, checkpoints and evaluation."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "plugins" / "shadow.py"))["check"](__name__)
