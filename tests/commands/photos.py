"""Folders of made-up photos: shapes on cluttered grounds, in files of every kind."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("circle", "cross", "ring", "square", "triangle")
ORIENTATION = 0x112
#: kind of file -> function that saves an RGB image as that kind
KINDS = ("rgb", "cmyk", "gray", "rgba", "16 bits", "rotated")


def write_photos(root: Path, per_class: int, seed: int = 0) -> None:
    """Write photos of five shapes, in a folder a class, of all kinds in turn."""
    rng = np.random.default_rng(seed)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            save(photo(name, rng), root / name / f"{i}", KINDS[i % len(KINDS)])


def photo(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw a light shape of any size and place on a dark ground of coarse colours and noise."""
    width, height = map(int, rng.integers(90, 260, 2))
    coarse = rng.integers(0, 128, (height // 16 + 1, width // 16 + 1, 3)).astype(np.uint8)
    ground = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
    image = Image.blend(ground, noise, 0.15)
    draw = ImageDraw.Draw(image)
    side = rng.uniform(0.4, 0.8) * min(width, height)
    x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
    colour = tuple(int(v) for v in rng.integers(128, 256, 3))
    third, box = side / 3, (x, y, x + side, y + side)
    if name == "circle":
        draw.ellipse(box, fill=colour)
    elif name == "ring":
        draw.ellipse(box, outline=colour, width=round(side / 6))
    elif name == "square":
        draw.rectangle(box, fill=colour)
    elif name == "triangle":
        draw.polygon([(x + side / 2, y), (x, y + side), (x + side, y + side)], fill=colour)
    else:
        draw.rectangle((x + third, y, x + 2 * third, y + side), fill=colour)
        draw.rectangle((x, y + third, x + side, y + 2 * third), fill=colour)
    return image


def save(image: Image.Image, path: Path, kind: str) -> None:
    """Save an RGB image as a file of `kind`, one of `KINDS`."""
    if kind == "16 bits":
        pixels = np.asarray(image.convert("L")).astype(np.uint16) * 257
        Image.fromarray(pixels).save(path.with_suffix(".png"))
    elif kind == "rotated":
        exif = Image.Exif()
        exif[ORIENTATION] = 6  # to be turned right by a quarter
        image.rotate(90, expand=True).save(path.with_suffix(".jpg"), exif=exif)
    elif kind == "cmyk":
        image.convert("CMYK").save(path.with_suffix(".jpg"))
    else:
        mode = {"rgb": "RGB", "gray": "L", "rgba": "RGBA"}[kind]
        image.convert(mode).save(path.with_suffix(".png"))
