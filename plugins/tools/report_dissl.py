"""The former name of the command ``python -m plugins.experiments.report_dissl``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("plugins.experiments.report_dissl", run_name="__main__", alter_sys=True)
