"""Converting images of any mode to 8-bit RGB for the networks."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import numpy as np


@cache
def image_endings() -> frozenset[str]:
    """Return the endings of the image files that Pillow can read, in lower case."""
    from PIL import Image

    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def to_rgb(image: Any) -> Any:
    """Return a PIL image as 8-bit RGB, upright. The conversion depends on its mode, never on its pixels' range.

    16-bit grey, 0 ... 65535, becomes 0 ... 255. Transparent pixels get a white background. Pillow converts grey,
    palette and CMYK images.

    Raises:
        ValueError: the pixels are floating-point numbers, or integers of more than 16 bits, which have no known range.
    """
    from PIL import Image, ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata; an image that cannot be read raises
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("expected pixels of 8 or 16 bits, got floating-point numbers")
        if image.mode.startswith("I"):  # I;16 and its variants, and I, in which Pillow opens some 16-bit files
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"expected pixels from 0 to 65535, got {values.min()} to {values.max()}")
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
