"""Images as the networks take them: 8-bit RGB, whatever the file held."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np


@cache
def image_endings() -> frozenset[str]:
    """Return the endings, lower case, of the image files that Pillow can read."""
    from PIL import Image

    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def to_rgb(image: Any) -> Any:
    """Return a PIL image as 8-bit RGB, upright. What it looks like follows from its mode, never from its own values.

    16-bit grey, 0 ... 65535, becomes 0 ... 255. What is transparent lies on white. Grey, palette and CMYK images are
    converted as Pillow does it.

    Raises:
        ValueError: pixels are floating-point numbers, or integers of more than 16 bits: no range says what is white.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata; an image that cannot be read raises
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers, which have no range; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # I;16 and its relatives, and I, as which Pillow reads some 16-bit files
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(
                    f"its pixels are from {values.min()} to {values.max()}, where 0 to 65535 are the range"
                )
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
