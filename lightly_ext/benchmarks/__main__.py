"""Pre-trains methods and evaluates them as lightly's benchmarks do: kNN, linear, fine-tuning.

    python -m lightly_ext.benchmarks --methods isoloss ssl_ey --train-dir imagenet/train --val-dir imagenet/val \
        --epochs 100 --batch-size-per-device 128 --devices 2 --precision 16-mixed

The last lines are a table in Markdown, which is written to <log-dir>/table.md too; <log-dir>/<method>/result.json has
the numbers. Accuracies are those after the last epoch: taking the best epoch would be choosing on the validation
labels. The classifiers are lightly's own, and with --add so can be methods: --add FILE takes a METHODS dictionary from
a Python file, such as lightly's benchmarks/imagenet/resnet50/main.py.
"""

import argparse
import sys
from pathlib import Path

from plugins.tools.command import Parser, exit_on_user_error, with_command_name
from plugins.tools.process import end_with_first_process, exit_when_stopped


def parser() -> Parser:
    """The command line."""
    name = "lightly_ext.benchmarks"
    text = with_command_name(__doc__ or "", name)
    result = Parser(f"python -m {name}", description=text, formatter_class=_Formatter)
    add = result.add_argument
    add("--methods", nargs="+", metavar="NAME", help="default: all of ours")
    add("--add", type=Path, metavar="FILE", help="Python file with a METHODS dictionary of further methods")
    add("--train-dir", type=Path, required=True, help="folder of training images, one subfolder for each class")
    add("--val-dir", type=Path, required=True, help="folder of validation images, of the same classes")
    add("--log-dir", type=Path, default=Path("benchmark_logs"), help="where everything goes")
    add("--epochs", type=int, default=100, help="of pre-training; 0 evaluates an untrained backbone")
    add("--batch-size-per-device", type=int, default=128)
    add("--num-workers", type=int, default=8)
    add("--accelerator", default="auto")
    add("--devices", type=int, default=1)
    add("--precision", default="32-true", help="such as 16-mixed or bf16-mixed")
    add("--strategy", help="of the Trainer; default: ddp_find_unused_parameters_true with several devices")
    add("--ckpt-path", type=Path, help="checkpoint of the one method named, to go on from")
    add("--seed", type=int)
    add("--backbone", default="resnet50", metavar="NAME", help="a model of torchvision, for our methods")
    add("--small-images", action="store_true", help="ResNet with a 3x3 stem of stride 1 and without max-pool")
    add("--input-size", type=int, default=224, help="side of the images in pixels")
    add("--optimizer", default="lars", choices=("lars", "sgd", "adamw"), help="for our methods")
    add("--lr", type=float, default=0.45, help="for 256 images over all devices; for our methods")
    add("--weight-decay", type=float, default=1e-6, help="for our methods")
    add("--decay-all", action="store_true", help="decay biases and normalisation too; for our methods")
    add("--warmup-epochs", type=float, default=10, help="for our methods")
    add("--option", nargs="+", default=[], metavar="KEY=VALUE", help="options of our methods, such as rho=0.99")
    add("--transform", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of our transforms: min_scale=0.6")
    add("--mean", type=float, nargs=3, help="of the images' channels; default: ImageNet's")
    add("--std", type=float, nargs=3)
    add("--knn-k", type=int, default=200)
    add("--knn-t", type=float, default=0.1)
    add("--linear-epochs", type=int, default=90)
    add("--linear-lr", type=float, default=0.1, help="for 256 images over all devices")
    add("--finetune-epochs", type=int, default=30)
    add("--finetune-lr", type=float, default=0.05, help="for 256 images over all devices")
    add("--eval-min-scale", type=float, default=0.08, help="smallest crop that a classifier trains on")
    add(
        "--eval-hf-prob",
        type=float,
        default=0.5,
        help="probability of a flip of the images that a classifier trains on",
    )
    add("--skip-knn-eval", action="store_true")
    add("--skip-linear-eval", action="store_true")
    add("--skip-finetune-eval", action="store_true")
    return result


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    end_with_first_process()
    with exit_on_user_error(), exit_when_stopped("run the command again"):
        args = parser().parse_args(arguments)
        from lightly_ext.benchmarks import run

        run.check(args)
        run.benchmark(args)


if __name__ == "__main__":
    sys.exit(main())
