"""The labels of a map, and images back to labels: what both the data and the judge go by.

A label is the background or one of eleven colours. A map of a glyph comes from its alpha and its colours; of a drawn
image, which has no alpha, the background is what is light and reaches the edge.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BACKGROUND, LIGHT = 0, 1
COLOURS = np.array(
    [
        (255, 0, 255),  # the background, in maps; of no image
        (250, 250, 250),  # light
        (144, 144, 144),  # gray
        (40, 40, 40),  # dark
        (224, 48, 48),  # red
        (255, 195, 50),  # yellow
        (240, 210, 170),  # beige
        (122, 82, 56),  # brown
        (68, 160, 72),  # green
        (120, 190, 240),  # light blue
        (43, 99, 217),  # blue
        (150, 80, 190),  # purple
    ],
    dtype=np.uint8,
)


def label_glyph(picture: NDArray[np.floating], alpha: NDArray[np.floating]) -> NDArray[np.int64]:
    """The image (h, w, 3) on white in [0, 255] and the alpha (h, w) of what is on it in [0, 1] -> labels (h, w)."""
    return smooth(np.where(alpha < 0.5, BACKGROUND, nearest_colour(picture)))


def label_picture(image: Image.Image) -> NDArray[np.int64]:
    """A drawn image -> labels (h, w), by its colours alone."""
    labels = nearest_colour(np.asarray(image.convert("RGB"), dtype=np.float32))
    light = labels == LIGHT
    outside = np.zeros_like(light)
    outside[[0, -1]], outside[:, [0, -1]] = light[[0, -1]], light[:, [0, -1]]
    while True:  # what is light and touches the outside is outside
        grown = light & (neighbours(outside).any(0))
        if (grown == outside).all():
            return smooth(np.where(outside, BACKGROUND, labels))
        outside = grown


def label_map(image: Image.Image) -> NDArray[np.int64]:
    """A map as it is on disk -> labels (h, w)."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.square(pixels[..., None, :] - COLOURS.astype(np.float32)).sum(-1).argmin(-1)


def map_picture(labels: NDArray[np.int64]) -> Image.Image:
    return Image.fromarray(COLOURS[labels])


def nearest_colour(pixels: NDArray[np.floating]) -> NDArray[np.int64]:
    """(h, w, 3) in [0, 255] -> (h, w): which of the colours, never the background."""
    return np.square(pixels[..., None, :] - COLOURS[1:].astype(np.float32)).sum(-1).argmin(-1) + 1


def smooth(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each pixel gets the commonest label of the nine around it; its own counts double."""
    chosen = labels[..., None] == np.arange(len(COLOURS))
    votes = neighbours(chosen).sum(0) + chosen
    return votes.argmax(-1)


def neighbours(grid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(h, w, ...) -> (9, h, w, ...): the pixels around each, and itself; nothing beyond the edge."""
    height, width = grid.shape[:2]
    padded = np.pad(grid, ((1, 1), (1, 1), *((0, 0),) * (grid.ndim - 2)))
    return np.stack([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)])
