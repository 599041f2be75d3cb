"""The former name of the command ``python -m plugins.experiments.toy_dynamics``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("plugins.experiments.toy_dynamics", run_name="__main__", alter_sys=True)
