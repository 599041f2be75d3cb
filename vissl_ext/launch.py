"""python -m vissl_ext.launch config=NAME [OVERRIDES]: VISSL's run_distributed_engines with our methods."""

import sys
from typing import Any

import torch

from plugins.tools.command import exit_on_user_error, say
from vissl_ext import ranks
from vissl_ext.defaults import cpu_safe


def main(argv: list[str]) -> None:
    """Compose the configuration that the command line names, and run it."""
    from vissl.utils.distributed_launcher import launch_distributed
    from vissl.utils.hydra_config import compose_hydra_configuration, convert_to_attrdict

    cfg: Any = compose_hydra_configuration(argv)
    if not torch.cuda.is_available():
        given = {word.lstrip("+").split("=")[0].removeprefix("config.") for word in argv}
        changed = cpu_safe(cfg, given)
        if changed:
            say(f"no GPU here: {', '.join(changed)}")
    args, config = convert_to_attrdict(cfg)
    launch_distributed(cfg=config, node_id=args.node_id, engine_name=args.engine_name, hook_generator=ranks.hooks)


if __name__ == "__main__":
    with exit_on_user_error():
        main(sys.argv[1:])
