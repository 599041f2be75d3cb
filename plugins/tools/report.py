"""The former name of the command ``python -m plugins.experiments.report``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("plugins.experiments.report", run_name="__main__", alter_sys=True)
