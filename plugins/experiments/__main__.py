"""Run a suite of experiments: ``python -m plugins.experiments digits``."""

import sys

from plugins.experiments.run import main

if __name__ == "__main__":
    sys.exit(main())
