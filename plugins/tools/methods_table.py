"""The former name of the command ``python -m plugins.experiments.methods_table``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("plugins.experiments.methods_table", run_name="__main__", alter_sys=True)
