"""Pictures of random pixels."""

import numpy as np
from PIL import Image


def random_picture(seed, width=12, height=10):
    """Return a colour image whose pixels are random, the same for the same seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
