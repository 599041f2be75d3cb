"""The task ``train`` of main.py: pre-training, and the evaluation of the network after the last epoch."""

from pathlib import Path
from typing import Any

import yaml

from plugins.tools.command import first_process, print_on_rank_zero
from plugins.tools.files import atomic
from solo_ext.compat import pl
from solo_ext.main_pretrain import pretrain
from solo_ext.ssv.arguments import Arguments
from solo_ext.ssv.checkpoints import load_network
from solo_ext.ssv.evaluate import RESULT, linear_eval
from solo_ext.ssv.metrics import NeighborMetrics
from solo_ext.ssv.repairs import announcements
from solo_ext.ssv.translate import translate

HYPERPARAMETERS = "hyperparameters.txt"


class LoadWeights(pl.Callback):
    """Load the weights of a trained network before the first epoch; a run that is resumed has its own.

    Args:
        place: folder of the network, or its file.
        algo: the algorithm.
    """

    def __init__(self, place: Path, algo: str) -> None:
        self.place, self.algo = place, algo

    def setup(self, trainer: pl.Trainer, module: Any, stage: str) -> None:
        """Load the weights into the network and its teacher."""
        load_network(self.place, self.algo, module)
        for student, teacher in getattr(module, "momentum_pairs", ()):
            teacher.load_state_dict(student.state_dict())


class Hyperparameters(pl.Callback):
    """Write the validated configuration to hyperparameters.txt, and delete the evaluation of a run that is made longer.

    Args:
        folder: the run's folder.
        document: the configuration.
    """

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.path, self.document = folder / HYPERPARAMETERS, document

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the file."""
        if trainer.is_global_zero:
            (self.path.parent / RESULT).unlink(missing_ok=True)
            with atomic(self.path, "w") as file:
                yaml.safe_dump(self.document, file)


def train(arguments: Arguments) -> None:
    """Pre-train, and evaluate the network after the last epoch as ``--task linear_eval`` does.

    The same command with the same ``--output`` resumes an interrupted run.

    Args:
        arguments: the arguments; ``load`` names the network whose weights the run begins with.

    Raises:
        UserError: the configuration, the data or a checkpoint is invalid.
    """
    document, algo, arch = arguments.document, arguments.algo, arguments.arch
    options = {"output": arguments.output, "devices": arguments.devices, "wandb": arguments.wandb}
    cfg = translate(document, algo, arch, **options)
    for line in announcements(algo):
        print_on_rank_zero(line)

    def further(folder: Path) -> list[Any]:
        loading = [] if arguments.load is None else [LoadWeights(arguments.load, algo)]
        return [*loading, Hyperparameters(folder, document), NeighborMetrics(folder, document["eval_every"])]

    folder = pretrain(cfg, further)
    if first_process() and not (folder / RESULT).is_file():
        linear_eval(arguments._replace(load=folder))
