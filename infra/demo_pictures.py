"""Draws the demo's pictures: twelve recognisable classes, as WebDataset tar shards.

    python infra/demo_pictures.py demo/shards

The same seed gives the same shards; a shard that exists is left alone.
"""

import argparse
import colorsys
import io
import json
import math
import random
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """One drawn picture: ``name`` without suffix, RGB ``image``, ``label`` index into DRAWINGS."""

    name: str
    image: Image.Image
    label: int


def draw_balloons(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = fill_gradient(size, pick_colour(rng, 0.55, 0.25, 0.95), (250, 250, 255))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 8)):
        x, y, radius = place_disc(rng, size, 0.07, 0.15)
        draw.line((x, y, x + rng.uniform(-8, 8), size[1]), fill=(90, 90, 90))
        draw.ellipse(
            (x - radius, y - 1.2 * radius, x + radius, y + 1.2 * radius),
            fill=pick_colour(rng, rng.random(), 0.85, 0.95),
        )
    return image


def draw_bricks(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, (190, 182, 172))
    draw = ImageDraw.Draw(image)
    height = rng.randint(14, 24)
    width = height * rng.uniform(2.0, 2.6)
    for row in range(size[1] // height + 1):
        x = -width * (0.5 if row % 2 else rng.uniform(0.95, 1.0))
        while x < size[0]:
            box = (x + 2, row * height + 2, x + width - 1, row * height + height - 1)
            draw.rectangle(box, fill=pick_colour(rng, 0.03, 0.6, rng.uniform(0.5, 0.75)))
            x += width
    return image


def draw_chessboard(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    side = rng.randint(18, 36)
    dark = pick_colour(rng, rng.choice((0.08, 0.3, 0.0)), 0.5, 0.35)
    image = Image.new("RGB", size, (238, 228, 205))
    draw = ImageDraw.Draw(image)
    for x in range(0, size[0], side):
        for y in range(0, size[1], side):
            if (x + y) // side % 2:
                draw.rectangle((x, y, x + side - 1, y + side - 1), fill=dark)
    return turn(image, rng.uniform(-12, 12))


def draw_confetti(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, (252, 250, 246))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(120, 220)):
        x, y, radius = place_disc(rng, size, 0.012, 0.03)
        angle = rng.uniform(0, math.tau)
        points = [turn_point(x, y, radius, angle + corner) for corner in (0.5, 2.6, 3.6, 5.8)]
        draw.polygon(points, fill=pick_colour(rng, rng.random(), 0.9, 0.95))
    return image


def draw_dartboard(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, pick_colour(rng, 0.08, 0.35, 0.45))
    draw = ImageDraw.Draw(image)
    x, y = size[0] * rng.uniform(0.42, 0.58), size[1] * rng.uniform(0.42, 0.58)
    rings = rng.randint(5, 9)
    colours = rng.choice((((200, 30, 40), (245, 240, 225)), ((20, 110, 60), (30, 30, 30))))
    for ring in range(rings, 0, -1):
        radius = ring / rings * 0.47 * min(size)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[ring % 2])
    return image


def draw_fir_trees(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = fill_gradient(size, (205, 220, 230), pick_colour(rng, 0.3, 0.35, 0.55))
    draw = ImageDraw.Draw(image)
    for step in range(rng.randint(7, 14)):
        x, foot = rng.uniform(0, size[0]), size[1] * (0.6 + 0.03 * step)
        height = size[1] * rng.uniform(0.3, 0.5)
        green = pick_colour(rng, 0.38, 0.6, rng.uniform(0.2, 0.4))
        for tier in range(3):
            top, half = foot - height * (1 - 0.25 * tier), height * (0.12 + 0.07 * tier)
            draw.polygon(
                ((x, top), (x - half, top + height / 2), (x + half, top + height / 2)), green
            )
    return image


def draw_flowers(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = fill_gradient(size, (120, 175, 80), (60, 120, 45))
    draw = ImageDraw.Draw(image)
    petals = pick_colour(rng, rng.choice((0.9, 0.95, 0.15, 0.78)), 0.65, 0.95)
    for _ in range(rng.randint(8, 16)):
        x, y, radius = place_disc(rng, size, 0.05, 0.1)
        for petal in range(6):
            px, py = turn_point(x, y, radius * 0.8, petal * math.tau / 6)
            half = radius * 0.45
            draw.ellipse((px - half, py - half, px + half, py + half), fill=petals)
        draw.ellipse(
            (x - radius / 3, y - radius / 3, x + radius / 3, y + radius / 3), (250, 205, 40)
        )
    return image


def draw_night_sky(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = fill_gradient(size, (4, 6, 22), pick_colour(rng, 0.65, 0.6, 0.25))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(80, 160)):
        x, y, radius = place_disc(rng, size, 0.002, 0.008)
        shade = rng.randint(150, 255)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(shade, shade, 255))
    x, y, radius = place_disc(rng, size, 0.08, 0.13)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 245, 215))
    return image


def draw_sea(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    horizon = int(size[1] * rng.uniform(0.3, 0.45))
    image = fill_gradient(size, (165, 205, 240), (225, 240, 250))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, horizon, *size), fill=pick_colour(rng, 0.56, 0.75, 0.6))
    length, phase = rng.uniform(18, 40), rng.uniform(0, math.tau)
    for line, y in enumerate(range(horizon + 6, size[1], 8)):
        wave = [(x, y + 3 * math.sin(x / length * 4 + phase + line)) for x in range(0, size[0], 3)]
        draw.line(wave, fill=pick_colour(rng, 0.53, 0.35, 0.9), width=2)
    return image


def draw_skyline(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = fill_gradient(size, pick_colour(rng, 0.6, 0.3, 0.75), (235, 225, 220))
    draw = ImageDraw.Draw(image)
    x = 0
    while x < size[0]:
        width, top = rng.randint(24, 48), int(size[1] * rng.uniform(0.15, 0.6))
        shade = rng.randint(60, 110)
        draw.rectangle((x, top, x + width, size[1]), fill=(shade, shade, shade + 10))
        for left in range(x + 5, x + width - 6, 9):
            for upper in range(top + 6, size[1] - 8, 11):
                lit = rng.random() < 0.6
                box = (left, upper, left + 4, upper + 6)
                draw.rectangle(box, fill=(250, 220, 130) if lit else (40, 45, 60))
        x += width + rng.randint(0, 5)
    return image


def draw_sunset(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    low = pick_colour(rng, rng.uniform(0.04, 0.1), 0.8, 0.98)
    image = fill_gradient(size, pick_colour(rng, 0.78, 0.55, 0.45), low)
    draw = ImageDraw.Draw(image)
    x, y = size[0] * rng.uniform(0.25, 0.75), size[1] * rng.uniform(0.5, 0.68)
    radius = min(size) * rng.uniform(0.1, 0.17)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 240, 170))
    image = image.filter(ImageFilter.GaussianBlur(3))
    ImageDraw.Draw(image).rectangle((0, size[1] * 0.78, *size), fill=(45, 22, 40))
    return image


def draw_zebra(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, (246, 244, 240))
    draw = ImageDraw.Draw(image)
    step, bend, phase = rng.randint(16, 30), rng.uniform(8, 20), rng.uniform(0, math.tau)
    rows = range(-40, size[1] + 40, 4)
    for x in range(-size[0], 2 * size[0], step):
        edge = [(x + bend * math.sin(y / 40 + phase) + y * 0.15, y) for y in rows]
        far_edge = [(left + step / 2, y) for left, y in reversed(edge)]
        draw.polygon(edge + far_edge, fill=(22, 20, 22))
    return turn(image, rng.uniform(-30, 30))


DRAWINGS: dict[str, Callable[[random.Random, tuple[int, int]], Image.Image]] = {
    "balloons": draw_balloons,
    "bricks": draw_bricks,
    "chessboard": draw_chessboard,
    "confetti": draw_confetti,
    "dartboard": draw_dartboard,
    "fir_trees": draw_fir_trees,
    "flowers": draw_flowers,
    "night_sky": draw_night_sky,
    "sea": draw_sea,
    "skyline": draw_skyline,
    "sunset": draw_sunset,
    "zebra": draw_zebra,
}


def pick_colour(rng: random.Random, hue: float, saturation: float, value: float) -> Colour:
    """Return a colour near the given hue, saturation and value (each in [0, 1])."""
    jittered = (hue + rng.uniform(-0.03, 0.03)) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(jittered, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def place_disc(
    rng: random.Random, size: tuple[int, int], smallest: float, largest: float
) -> tuple[float, float, float]:
    """Return x, y and a radius that is between two shares of the short side."""
    radius = min(size) * rng.uniform(smallest, largest)
    return rng.uniform(0, size[0]), rng.uniform(0, size[1]), radius


def turn_point(x: float, y: float, radius: float, angle: float) -> tuple[float, float]:
    return x + radius * math.cos(angle), y + radius * math.sin(angle)


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate about the middle and cut the empty corners off."""
    width, height = image.size
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    margin = (int(width * 0.18), int(height * 0.18))
    return turned.crop((*margin, width - margin[0], height - margin[1])).resize(image.size)


def fill_gradient(size: tuple[int, int], top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGB", size, bottom), Image.new("RGB", size, top), ramp)


def draw_pictures(number: int, seed: int) -> Iterator[Picture]:
    """Yield ``number`` pictures, the classes in turn."""
    for position in range(number):
        label = position % len(DRAWINGS)
        name, draw = list(DRAWINGS.items())[label]
        rng = random.Random(f"{seed}/{position}")
        size = (rng.randint(240, 360), rng.randint(220, 320))
        yield Picture(f"{name}-{position // len(DRAWINGS):03d}", draw(rng, size), label)


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, pictures: list[Picture]) -> None:
    """Write a tar that appears under ``path`` only when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as tar:
        for picture in pictures:
            encoded = io.BytesIO()
            picture.image.save(encoded, "JPEG", quality=90)
            facts = {"class": list(DRAWINGS)[picture.label], "size": picture.image.size}
            add_member(tar, f"{picture.name}.jpg", encoded.getvalue())
            add_member(tar, f"{picture.name}.cls", str(picture.label).encode())
            add_member(tar, f"{picture.name}.json", json.dumps(facts).encode())
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--number", type=int, default=360, help="pictures in all")
    parser.add_argument("--per-shard", type=int, default=60, help="pictures in a shard")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, options.number, options.per_shard)
    paths = [options.folder / f"pictures-{shard:05d}.tar" for shard in range(len(starts))]
    if all(path.exists() for path in paths):
        return
    pictures = list(draw_pictures(options.number, options.seed))
    for path, start in zip(paths, starts, strict=True):
        if not path.exists():
            write_shard(path, pictures[start : start + options.per_shard])
    print(f"drew {options.number} pictures of {len(DRAWINGS)} classes into {options.folder}")


if __name__ == "__main__":
    main()
