"""Everything that we register with VISSL; a rank and a worker of a data loader register it anew."""


def register() -> None:
    """Import what registers itself. May be called again without harm."""
    from vissl_ext import dissl_losses, features, heads, methods, model, schedules, task, transforms, trunks  # noqa: F401

    task.replace_task()
    features.replace_trainer()
    model.replace_model()
    trunks.replace_resnet()
    transforms.replace_transforms()
