"""Pictures of the world of `demo-multimodal`, 84 x 84: coloured shapes in five places, or one drawn digit."""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from asked import Question
from hands import Hand, strokes

SIDE = 84
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "yellow": (242, 212, 45),
    "purple": (145, 55, 180),
    "orange": (242, 132, 30),
}
SHAPES = ("circle", "square", "triangle", "star")
PLACES = {"left": (15, 42), "right": (69, 42), "top": (42, 15), "bottom": (42, 69), "middle": (42, 42)}
SMALL, LARGE = (7.0, 8.6), (11.0, 12.8)  # radii; all of one picture that are compared come from both ranges
TRAINING_HANDS = 2000  # hands from here on are held out
DESCRIBE = "Describe the picture."
SHARPNESS = 4  # pictures are drawn this many times larger, then reduced


@dataclass(frozen=True)
class Thing:
    """A shape in a picture."""

    shape: str
    colour: str
    place: str
    large: bool

    @property
    def name(self) -> str:
        """Its colour and shape with an article."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture and what it shows: things, or a digit in a colour."""

    pixels: np.ndarray  # uint8 [84, 84, 3]
    things: tuple[Thing, ...]
    digit: int | None = None
    colour: str = ""


def is_held_out(things: tuple[Thing, ...]) -> bool:
    """True for an eighth of all combinations of shapes, colours and places."""
    key = "|".join(sorted(f"{thing.shape} {thing.colour} {thing.place}" for thing in things))
    return zlib.crc32(key.encode()) % 8 == 0


def make_picture(rng: random.Random, *, held_out: bool = False, most: int = 4, digits: float = 0.3) -> Picture:
    """Draws a random picture.

    Args:
        rng: the source of every choice.
        held_out: draw what training never sees: a held-out combination of shapes, or a held-out hand.
        most: the most shapes, from 1 to 4.
        digits: share of the pictures that show a digit.
    """
    if rng.random() < digits:
        digit, colour = rng.randrange(10), rng.choice(list(COLOURS))
        hand = Hand(rng.randrange(TRAINING_HANDS) + (TRAINING_HANDS if held_out else 0))
        return Picture(_paint(rng, (), (digit, hand, colour)), (), digit, colour)
    while True:
        places = rng.sample(list(PLACES), min(most, rng.choice((1, 2, 2, 3, 3, 4))))
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(list(COLOURS)), place, rng.random() < 0.5) for place in places
        )
        if is_held_out(things) == held_out:
            return Picture(_paint(rng, things), things)


def _jitter(rng: random.Random, colour: tuple[int, ...], spread: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, part + rng.randint(-spread, spread))) for part in colour)


def _paint(rng: random.Random, things: tuple[Thing, ...], drawn: tuple[int, Hand, str] | None = None) -> np.ndarray:
    """Draws onto a plain or noisy grey background, light or dark."""
    from PIL import Image, ImageDraw

    level, scale = rng.choice((rng.randint(215, 255), rng.randint(0, 45))), SHARPNESS
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), _jitter(rng, (level,) * 3, 8))
    draw = ImageDraw.Draw(image)
    for thing in things:
        x, y = (scale * (at + rng.uniform(-1.5, 1.5)) for at in PLACES[thing.place])
        radius = scale * rng.uniform(*(LARGE if thing.large else SMALL))
        _shape(draw, thing.shape, x, y, radius, rng.uniform(-0.2, 0.2), _jitter(rng, COLOURS[thing.colour], 14))
    if drawn is not None:
        digit, hand, colour = drawn
        tall, ink = rng.uniform(46, 62), _jitter(rng, COLOURS[colour], 14)
        left, top = (SIDE / 2 - tall * part / 2 + rng.uniform(-6, 6) for part in (0.7, 1.0))
        pen = max(1, round(scale * hand.width * tall / 45))
        for line in strokes(digit, hand, rng):
            points = [(scale * (left + tall * x), scale * (top + tall * y)) for x, y in line]
            draw.line(points, fill=ink, width=pen, joint="curve")
            for x, y in (points[0], points[-1]):
                draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=ink)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    noise = rng.choice((0.0, 0.0, rng.uniform(2, 14)))
    if noise:
        pixels = pixels + noise * np.random.default_rng(rng.getrandbits(32)).standard_normal(pixels.shape)
    return pixels.clip(0, 255).round().astype(np.uint8)


def _shape(draw: Any, shape: str, x: float, y: float, radius: float, turn: float, ink: tuple[int, ...]) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    corners, inner = {"square": (4, 0.0), "triangle": (3, 0.0), "star": (5, 0.42)}[shape]
    first = turn + (-math.pi / 4 if shape == "square" else -math.pi / 2)
    points = []
    for corner in range(corners):
        for share, part in ((1.0, 0.0), (inner, 0.5)) if inner else ((1.0, 0.0),):
            angle = first + 2 * math.pi * (corner + part) / corners
            points.append((x + 1.12 * share * radius * math.cos(angle), y + 1.12 * share * radius * math.sin(angle)))
    draw.polygon(points, fill=ink)


def at(place: str) -> str:
    """A place with its preposition: "on the left", "in the middle"."""
    return f"{'in' if place == 'middle' else 'on' if place in ('left', 'right') else 'at'} the {place}"


def description(picture: Picture) -> str:
    """All that a picture shows: the things in the order of `PLACES`."""
    if picture.digit is not None:
        return f"the digit {picture.digit} in {picture.colour}"
    things = sorted(picture.things, key=lambda thing: [*PLACES].index(thing.place))
    return ", ".join(f"{thing.name} {at(thing.place)}" for thing in things)


def simple_questions(picture: Picture, rng: random.Random) -> list[Question]:
    """Questions about the shape at each place, in random order; about a digit, its value and its colour."""
    if picture.digit is not None:
        return questions(picture, rng)
    there = {thing.place: thing.name for thing in picture.things}
    places = rng.sample(list(PLACES), len(PLACES))
    return [Question("what", f"What is {at(place)}?", there.get(place, "nothing")) for place in places]


def questions(picture: Picture, rng: random.Random) -> list[Question]:
    """Every question that has one answer, in random order."""
    if picture.digit is not None:
        found = [
            ("digit", rng.choice(("What digit is it?", "Which digit is this?", "digit")), f"{picture.digit}"),
            ("colour", rng.choice(("What colour is the digit?", "What colour is it?", "colour")), picture.colour),
            ("what", "What is in the picture?", f"the digit {picture.digit}"),
            ("describe", DESCRIBE, description(picture)),
        ]
        rng.shuffle(found)
        return [Question(*each) for each in found]
    things = picture.things
    shapes, colours = Counter(thing.shape for thing in things), Counter(thing.colour for thing in things)
    kinds = Counter((thing.colour, thing.shape) for thing in things)
    only = things[0].name if len(things) == 1 else f"{len(things)} shapes"
    found = [
        ("count", rng.choice(("How many shapes are there?", "How many shapes do you see?", "count")), f"{len(things)}"),
        ("what", "What is in the picture?", only),
        ("describe", DESCRIBE, description(picture)),
    ]
    counted, place = rng.choice(SHAPES), rng.choice(list(PLACES))
    found.append(("count", f"How many {counted}s are there?", f"{shapes[counted]}"))
    there = [thing.name for thing in things if thing.place == place]
    found.append(("what", f"What is {at(place)}?", there[0] if there else "nothing"))
    if len(things) == 1:
        found += [
            ("colour", rng.choice(("What colour is it?", "colour")), things[0].colour),
            ("shape", rng.choice(("What shape is it?", "shape")), things[0].shape),
            ("where", rng.choice(("Where is it?", "where")), at(things[0].place)),
        ]
    for thing in things:
        if shapes[thing.shape] == 1:
            found.append(("colour", f"What colour is the {thing.shape}?", thing.colour))
        if colours[thing.colour] == 1:
            found.append(("shape", f"What shape is {thing.colour}?", thing.shape))
        if kinds[thing.colour, thing.shape] == 1:
            found.append(("where", f"Where is the {thing.colour} {thing.shape}?", at(thing.place)))
    pairs = [(a, b) for a in things for b in things if a.large and not b.large]
    pairs = [(a, b) for a, b in pairs if shapes[a.shape] == shapes[b.shape] == 1]
    for large, small in pairs[:1]:
        first, second = rng.sample((large, small), 2)
        found.append(("larger", f"Which is larger, the {first.shape} or the {second.shape}?", f"the {large.shape}"))
    rng.shuffle(found)
    return [Question(*each) for each in found]
