"""The former name of the command ``python -m plugins.experiments.bench``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("plugins.experiments.bench", run_name="__main__", alter_sys=True)
