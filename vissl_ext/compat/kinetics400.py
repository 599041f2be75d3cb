"""``torchvision.datasets.kinetics.Kinetics400``, which torchvision has renamed to ``Kinetics`` in 0.14.

Imported by classy_vision/dataset/classy_kinetics400.py:11.
"""


def activate() -> None:
    """Add the former name of the class."""
    from torchvision.datasets import kinetics

    if not hasattr(kinetics, "Kinetics400"):
        kinetics.Kinetics400 = kinetics.Kinetics
