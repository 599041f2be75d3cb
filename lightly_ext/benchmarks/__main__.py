"""Pre-train methods, and evaluate them like lightly's benchmarks: kNN, linear evaluation, fine-tuning.

    python -m lightly_ext.benchmarks --methods isoloss ssl_ey --train-dir imagenet/train --val-dir imagenet/val \
        --epochs 100 --batch-size-per-device 128 --devices 2 --precision 16-mixed

The command prints a Markdown table of the results and writes it to <log-dir>/table.md. The results of a method are in
<log-dir>/<method>/result.json. Accuracies are those of the last epoch, since the best epoch would be selected by the
validation labels. The classifiers are those of lightly. --add FILE adds the methods of the METHODS dictionary in a
Python file, such as lightly's benchmarks/imagenet/resnet50/main.py.
"""

import sys

from plugins.tools.command import exit_on_user_error, with_command_name
from plugins.tools.process import end_with_first_process, exit_when_stopped


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    end_with_first_process()
    with exit_on_user_error(), exit_when_stopped("run the command again"):
        from lightly_ext.benchmarks import schema

        name = "lightly_ext.benchmarks"
        parser = schema.parser(f"python -m {name}", with_command_name(__doc__ or "", name))
        options = schema.validate(vars(parser.parse_args(arguments)))
        from lightly_ext.benchmarks import run

        run.benchmark(run.prepare(options))


if __name__ == "__main__":
    sys.exit(main())
