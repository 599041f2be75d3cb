"""Open an image file; one that is broken is named."""

from typing import Any

from PIL import Image

from plugins.tools.command import UserError


def open_image(source: Any, name: str | None = None) -> Image.Image:
    """Read an image in RGB.

    Args:
        source: a path, or an open binary file.
        name: what to call it in the sentence; its path when None.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(source) as file:
            return file.convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{name or source} cannot be read as an image: {reason}") from None
