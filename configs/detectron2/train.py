"""Trains and evaluates a detector with detectron2, on the weights that ``plugins.tools.export --to detectron2`` wrote.

    python configs/detectron2/train.py --num-gpus 8 --config-file configs/detectron2/coco_r50_c4_1x.yaml \\
        MODEL.WEIGHTS r50.pkl

It is detectron2's own trainer with one head more: that of the C4 model with a norm behind res5, without which features
that come unnormalised out of the last stage do not train.
"""

import os
import sys

try:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
    from detectron2.evaluation import COCOEvaluator
    from detectron2.layers import get_norm
    from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
except ImportError as error:
    print(
        f"error: detectron2 is not installed ({error}); build it from its repository, facebookresearch/detectron2, "
        "with: python -m pip install --no-build-isolation PATH_TO_ITS_CHECKOUT",
        file=sys.stderr,
    )
    sys.exit(2)


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 head, its last stage followed by a norm of the same kind as the backbone's."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, self.res5[-1].out_channels))


class Trainer(DefaultTrainer):
    """Evaluates with COCO's own measure."""

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        return COCOEvaluator(dataset_name, output_dir=output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def run(args):
    """One process of the training."""
    config = get_cfg()
    config.merge_from_file(args.config_file)
    config.merge_from_list(args.opts)
    config.freeze()
    default_setup(config, args)
    trainer = Trainer(config)
    trainer.resume_or_load(resume=args.resume)
    return Trainer.test(config, trainer.model) if args.eval_only else trainer.train()


if __name__ == "__main__":
    options = default_argument_parser().parse_args()
    launch(
        run,
        options.num_gpus,
        num_machines=options.num_machines,
        machine_rank=options.machine_rank,
        dist_url=options.dist_url,
        args=(options,),
    )
