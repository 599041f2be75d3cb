"""``torchvision.datasets.kinetics.Kinetics400``, which torchvision calls ``Kinetics`` since 0.14.

Imported by classy_vision/dataset/classy_kinetics400.py:11.
"""


def activate() -> None:
    """Give the class its former name again."""
    from torchvision.datasets import kinetics

    if not hasattr(kinetics, "Kinetics400"):
        kinetics.Kinetics400 = kinetics.Kinetics
