"""Everything that we register with VISSL; a rank and a worker of a data loader register it anew."""


def register() -> None:
    """Import what registers itself. May be called again without harm."""
