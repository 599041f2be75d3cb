"""Everything that we register with VISSL; a rank and a worker of a data loader register it anew."""


def register() -> None:
    """Import what registers itself. May be called again without harm."""
    from vissl_ext import features, heads, methods, schedules, task, trunks  # noqa: F401
    from vissl_ext.dissl import convnext, losses, model, resnet, transforms  # noqa: F401

    task.replace_task()
    features.replace_trainer()
    model.replace_model()
    resnet.replace_resnet()
    transforms.replace_transforms()
