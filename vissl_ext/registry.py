"""Registration of this package with VISSL, in each process of a run and in each worker of a data loader."""


def register() -> None:
    """Import the modules that register classes, and replace VISSL's classes. Repeated calls have no effect."""
    from vissl_ext import (  # noqa: F401  # noqa: F401
        clusters,
        dissl_losses,
        features,
        heads,
        masks,
        methods,
        model,
        retrieval,
        schedules,
        svm,
        task,
        transforms,
        trunks,
    )

    task.replace_task()
    features.replace_trainer()
    model.replace_model()
    trunks.replace_resnet()
    transforms.replace_transforms()
    masks.replace_multi_crop()
