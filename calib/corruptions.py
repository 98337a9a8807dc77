"""Pictures made worse, the same way each time: noise, blur, JPEG, brightness, contrast, occlusion, shift.

Strengths 1 to 5. Noise, blur, JPEG, brightness and contrast are those of ImageNet-C (Hendrycks and Dietterich, arXiv
1903.12261) with its constants, which were chosen on pictures of 224 pixels; the width of the blur scales with the
shorter side. What is random follows from the picture and the name of the corruption: whoever is shown a picture is
shown the very same one, and a greater strength is more of the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .sample import ImageSource, Sample

STRENGTHS = (1, 2, 3, 4, 5)
SIDE = 224  # pixels of the pictures that ImageNet-C's constants were chosen on
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of 1
BLUR = (1, 2, 3, 4, 6)  # standard deviation, pixels of a picture of SIDE
JPEG = (25, 18, 15, 10, 7)  # quality
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of hue, saturation and value
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # what remains of the distance to the mean colour
OCCLUSION = (0.2, 0.3, 0.4, 0.5, 0.6)  # sides of the covered box, of the picture's
SHIFT = (0.05, 0.1, 0.15, 0.2, 0.3)  # of the picture's sides

Pixels = NDArray[np.float64]  # [height, width, 3], from 0 to 1
Draw = np.random.Generator


def noise(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """Gaussian noise on every channel."""
    return pixels + NOISE[strength - 1] * draw.standard_normal(pixels.shape)


def blur(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """A Gaussian blur, cut off at four standard deviations; the border's pixels go on outside."""
    sigma = BLUR[strength - 1] * min(pixels.shape[:2]) / SIDE
    reach = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (0, 1):
        wide = np.pad(pixels, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = pixels.shape[axis]
        pixels = sum(tap * wide.take(range(i, i + size), axis) for i, tap in enumerate(taps))
    return pixels


def jpeg(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """Saved as JPEG and opened again."""
    stored = io.BytesIO()
    _picture(pixels).save(stored, "JPEG", quality=JPEG[strength - 1])
    with Image.open(stored) as opened:
        return _pixels(opened)


def brightness(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """Value of hue, saturation and value raised: the largest channel grows, the others keep their ratio to it."""
    value = pixels.max(2, keepdims=True)
    more = np.minimum(value + BRIGHTNESS[strength - 1], 1)
    return np.where(value > 0, pixels * (more / np.where(value > 0, value, 1)), more)


def contrast(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """Every channel moved towards its mean."""
    mean = pixels.mean((0, 1), keepdims=True)
    return (pixels - mean) * CONTRAST[strength - 1] + mean


def occlusion(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """A grey box somewhere; the box of a greater strength covers that of a smaller one."""
    place = draw.random(2)
    height, width = (max(1, round(OCCLUSION[strength - 1] * side)) for side in pixels.shape[:2])
    top, left = int(place[0] * (pixels.shape[0] - height + 1)), int(place[1] * (pixels.shape[1] - width + 1))
    made = pixels.copy()
    made[top : top + height, left : left + width] = 0.5
    return made


def shift(pixels: Pixels, strength: int, draw: Draw) -> Pixels:
    """Moved sideways and up or down, by the same share of both sides; what comes in has the mean colour."""
    moves = [round(SHIFT[strength - 1] * side) * int(way) for side, way in zip(pixels.shape, draw.choice([-1, 1], 2))]
    made = np.broadcast_to(pixels.mean((0, 1)), pixels.shape).copy()
    to = tuple(slice(max(move, 0), side + min(move, 0)) for move, side in zip(moves, pixels.shape))
    since = tuple(slice(max(-move, 0), side + min(-move, 0)) for move, side in zip(moves, pixels.shape))
    made[to] = pixels[since]
    return made


CORRUPTIONS: dict[str, Callable[[Pixels, int, Draw], Pixels]] = {
    made.__name__: made for made in (noise, blur, jpeg, brightness, contrast, occlusion, shift)
}


def corrupt(picture: Image.Image, name: str, strength: int) -> Image.Image:
    """An RGB picture, corrupted; the same picture, name and strength give the same pixels.

    Args:
        name: of `CORRUPTIONS`. strength: 1 to 5.
    """
    seed = hashlib.sha256(f"{name} {picture.size} ".encode() + picture.tobytes()).digest()[:8]
    draw = np.random.default_rng(int.from_bytes(seed, "little"))
    return _picture(CORRUPTIONS[name](_pixels(picture), strength, draw))


def corrupted(sample: Sample, name: str, strength: int) -> Sample:
    """The same question about pictures that are corrupted when they are opened."""

    def worse(image: ImageSource) -> ImageSource:
        return ImageSource(picture=partial(_opened, image, name, strength), where=f"{image.where}, {name} {strength}")

    return dataclasses.replace(sample, images=tuple(map(worse, sample.images)))


def _opened(image: ImageSource, name: str, strength: int) -> Image.Image:
    return corrupt(image.open(), name, strength)


def _pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture, dtype=np.float64) / 255


def _picture(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8), "RGB")
