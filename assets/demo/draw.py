"""Draws the portraits of the demo world and writes their captions.

A portrait is fully described by a frozen `Portrait`; the same value always gives the same pixels. Shapes are
drawn in units of the final picture at four times its size and then averaged down, so that edges are smooth.
"Left" and "right" are the viewer's left and right, unless a name says otherwise.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Point = tuple[float, float]

SIZE_PX: Final = 128
_OVERSAMPLING: Final = 4

BACKGROUNDS: Final[dict[str, Rgb]] = {
    "red": (226, 98, 88),
    "yellow": (247, 205, 98),
    "green": (126, 190, 126),
    "blue": (106, 166, 226),
    "purple": (158, 126, 208),
    "pink": (246, 172, 198),
    "grey": (172, 178, 186),
    "white": (244, 241, 236),
}
PATTERNS: Final = ("plain", "dots", "stripes", "circle")
CLOTHES: Final[dict[str, Rgb]] = {
    "red": (200, 58, 60),
    "yellow": (238, 180, 50),
    "green": (58, 140, 92),
    "blue": (52, 98, 172),
    "purple": (114, 72, 160),
    "white": (240, 240, 240),
    "black": (50, 50, 58),
}
GARMENTS: Final = ("sweater", "hoodie", "shirt")
HAIRS: Final[dict[str, Rgb]] = {
    "black": (44, 40, 48),
    "brown": (112, 70, 46),
    "blonde": (234, 198, 112),
    "ginger": (200, 86, 38),
    "grey": (166, 166, 174),
    "pink": (224, 106, 156),
}
UNSEEN_HAIR: Final[dict[str, Rgb]] = {"blue": (46, 94, 176)}
"""Only the demo's subject has it; the base model is trained without."""
STYLES: Final = ("short", "long", "bob", "bun", "curly")
SKINS: Final[dict[str, Rgb]] = {
    "light": (252, 220, 196),
    "tan": (230, 180, 142),
    "brown": (172, 116, 82),
    "dark": (114, 76, 58),
}
FACINGS: Final = ("left", "front", "right")

PATCH: Final[Rgb] = (22, 20, 28)
_INK: Final[Rgb] = (40, 32, 40)
_MOUTH: Final[Rgb] = (168, 44, 58)
_BLUSH: Final[Rgb] = (232, 84, 84)
_WHITE: Final[Rgb] = (255, 255, 255)


@dataclass(frozen=True)
class Portrait:
    """What a picture shows; every field can be seen in its pixels.

    `dx`, `dy` (pixels) and `scale` move and size the person, `tint` (-1 to 1) shifts all colours a little, so
    that no two pictures of one description are equal. `eye_patch` covers the person's own left eye, which the
    viewer sees on the right.
    """

    hair: str
    style: str
    skin: str
    background: str
    pattern: str
    clothes: str
    garment: str
    facing: str
    glasses: bool = False
    smile: bool = True
    eye_patch: bool = False
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    tint: float = 0.0


def random_portrait(rng: random.Random) -> Portrait:
    """Draws the attributes of one portrait of the base model's world (never the subject's traits)."""
    return Portrait(
        hair=rng.choice(list(HAIRS)),
        style=rng.choice(STYLES),
        skin=rng.choice(list(SKINS)),
        background=rng.choice(list(BACKGROUNDS)),
        pattern=rng.choices(PATTERNS, weights=(4, 2, 2, 2))[0],
        clothes=rng.choice(list(CLOTHES)),
        garment=rng.choice(GARMENTS),
        facing=rng.choice(FACINGS),
        glasses=rng.random() < 0.2,
        smile=rng.random() < 0.6,
        dx=rng.uniform(-2, 2),
        dy=rng.uniform(-2, 2),
        scale=rng.uniform(0.97, 1.03),
        tint=rng.uniform(-1, 1),
    )


def background_phrase(portrait: Portrait) -> str:
    """The background in words, such as "blue background with dots"."""
    words = {"plain": "", "dots": " with dots", "stripes": " with stripes", "circle": " with a circle"}
    return f"{portrait.background} background{words[portrait.pattern]}"


def facing_phrase(portrait: Portrait) -> str:
    """Which way the face looks, in words."""
    return "facing the viewer" if portrait.facing == "front" else f"facing {portrait.facing}"


def caption(portrait: Portrait, rng: random.Random, drop: float = 0.15) -> str:
    """One of several ways to say what the picture shows, as tags or as a sentence.

    Args:
        portrait: What to describe. Its eye patch is never mentioned.
        rng: Chooses the phrasing and what is left unsaid.
        drop: Probability of leaving out each attribute.

    Returns:
        The caption, in lower case, at most 40 tokens of the demo's tokenizer.
    """

    def said() -> bool:
        return rng.random() >= drop

    subject = "person"
    if rng.random() < 0.1:  # Names that mean nothing: the model learns to read past a word it does not know.
        subject = f"{_gibberish(rng)} person"
    hair = f"{portrait.style} {portrait.hair} hair" if said() else ""
    if hair and rng.random() < 0.15:
        hair = f"{portrait.hair} hair"
    skin = f"{portrait.skin} skin" if rng.random() < 0.6 else ""
    clothes = f"{portrait.clothes} {portrait.garment}" if said() else ""
    background = background_phrase(portrait) if said() else ""
    facing = facing_phrase(portrait) if said() else ""
    glasses = "glasses" if portrait.glasses and rng.random() < 0.9 else ""
    mood = ("smiling" if portrait.smile else "serious") if rng.random() < 0.5 else ""
    if rng.random() < 0.65:
        tags = [tag for tag in (hair, skin, clothes, background, facing, glasses, mood) if tag]
        rng.shuffle(tags)
        return ", ".join([rng.choice(("", "portrait of a ")) + subject, *tags])
    words = rng.choice(("a drawing of a", "a portrait of a", "portrait of a"))
    words += f" {mood} {subject}" if mood else f" {subject}"
    if has := [thing for thing in (hair, skin, glasses) if thing]:
        words += " with " + " and ".join(has)
    if clothes:
        words += f" wearing a {clothes}"
    if facing:
        words += f", {facing}"
    if background:
        words += f", {rng.choice(('', 'in front of a '))}{background}"
    return words


def _gibberish(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))


def draw(portrait: Portrait, size_px: int = SIZE_PX) -> Image.Image:
    """Draws the portrait as an RGB picture of `size_px` x `size_px` pixels."""
    canvas = _Canvas(portrait)
    _draw_background(canvas, portrait)
    canvas.moves = True
    _draw_back_hair(canvas, portrait)
    _draw_body(canvas, portrait)
    _draw_head(canvas, portrait)
    _draw_features(canvas, portrait)
    _draw_front_hair(canvas, portrait)
    if portrait.eye_patch:
        _draw_eye_patch(canvas, portrait)
    if portrait.glasses:
        _draw_glasses(canvas, portrait)
    return canvas.image.resize((size_px, size_px), Image.Resampling.BOX)


def _mix(a: Rgb, b: Rgb, share_of_b: float) -> Rgb:
    return (
        round(a[0] + (b[0] - a[0]) * share_of_b),
        round(a[1] + (b[1] - a[1]) * share_of_b),
        round(a[2] + (b[2] - a[2]) * share_of_b),
    )


def _darker(colour: Rgb, share: float = 0.18) -> Rgb:
    return _mix(colour, (30, 16, 50), share)


def _lighter(colour: Rgb, share: float = 0.3) -> Rgb:
    return _mix(colour, _WHITE, share)


def background_colours(name: str) -> list[Rgb]:
    """The background's own colour and that of its pattern."""
    base = BACKGROUNDS[name]
    return [base, _darker(base, 0.1) if name == "white" else _lighter(base, 0.28)]


def clothes_colours(name: str) -> list[Rgb]:
    """Cloth in the light and in the shade."""
    return [CLOTHES[name], _darker(CLOTHES[name], 0.16)]


def hair_colours(name: str) -> list[Rgb]:
    """Hair, its shine and its shaded back."""
    hair = (HAIRS | UNSEEN_HAIR)[name]
    return [hair, _lighter(hair, 0.22), _darker(hair, 0.2)]


def palette() -> list[Rgb]:
    """All large areas' colours in the drawn world."""
    colours = [c for name in BACKGROUNDS for c in background_colours(name)]
    colours += [c for name in CLOTHES for c in clothes_colours(name)]
    colours += [c for name in HAIRS | UNSEEN_HAIR for c in hair_colours(name)]
    colours += [c for skin in SKINS.values() for c in (skin, _darker(skin, 0.14), _mix(skin, _BLUSH, 0.28))]
    return [*colours, PATCH, _INK, _MOUTH, _WHITE]


def _curve(points: Sequence[Point], closed: bool = True, pieces: int = 8) -> list[Point]:
    """A smooth line through the points (Catmull and Rom 1974, uniform)."""
    count = len(points)
    out: list[Point] = []
    for i in range(count if closed else count - 1):
        if closed:
            p0, p1, p2, p3 = (points[(i + k) % count] for k in (-1, 0, 1, 2))
        else:
            p0, p1, p2, p3 = (points[min(max(i + k, 0), count - 1)] for k in (-1, 0, 1, 2))
        for step in range(pieces):
            t = step / pieces
            x, y = (
                0.5
                * (
                    2 * b
                    + (c - a) * t
                    + (2 * a - 5 * b + 4 * c - d) * t * t
                    + (3 * b - a - 3 * c + d) * t * t * t
                )
                for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
            )
            out.append((x, y))
    if not closed:
        out.append(points[-1])
    return out


class _Canvas:
    """A picture addressed in units of the final 128 pixels; once `moves`, shapes follow the person's jitter."""

    def __init__(self, portrait: Portrait) -> None:
        side = SIZE_PX * _OVERSAMPLING
        self.image = Image.new("RGB", (side, side))
        self.pen = ImageDraw.Draw(self.image)
        self.portrait = portrait
        self.moves = False

    def colour(self, rgb: Rgb) -> Rgb:
        t = self.portrait.tint
        return _mix(rgb, (255, 244, 214), 0.05 * t) if t > 0 else _mix(rgb, (20, 24, 60), -0.05 * t)

    def at(self, point: Point) -> Point:
        x, y = point
        if self.moves:
            p = self.portrait
            x = 64 + (x - 64) * p.scale + p.dx
            y = 128 + (y - 128) * p.scale + p.dy
        return x * _OVERSAMPLING, y * _OVERSAMPLING

    def length(self, value: float) -> float:
        return value * _OVERSAMPLING * (self.portrait.scale if self.moves else 1)

    def shape(self, points: Sequence[Point], rgb: Rgb) -> None:
        self.pen.polygon([self.at(p) for p in points], fill=self.colour(rgb))

    def blob(self, points: Sequence[Point], rgb: Rgb) -> None:
        self.shape(_curve(points), rgb)

    def oval(self, x: float, y: float, rx: float, ry: float, rgb: Rgb) -> None:
        cx, cy = self.at((x, y))
        a, b = self.length(rx), self.length(ry)
        self.pen.ellipse((cx - a, cy - b, cx + a, cy + b), fill=self.colour(rgb))

    def ring(self, x: float, y: float, r: float, width: float, rgb: Rgb) -> None:
        cx, cy = self.at((x, y))
        a = self.length(r)
        box = (cx - a, cy - a, cx + a, cy + a)
        self.pen.ellipse(box, outline=self.colour(rgb), width=round(self.length(width)))

    def stroke(self, points: Sequence[Point], width: float, rgb: Rgb) -> None:
        moved = [self.at(p) for p in points]
        fill, w = self.colour(rgb), self.length(width)
        self.pen.line(moved, fill=fill, width=round(w), joint="curve")
        for x, y in (moved[0], moved[-1]):
            self.pen.ellipse((x - w / 2, y - w / 2, x + w / 2, y + w / 2), fill=fill)


def _turn(portrait: Portrait) -> float:
    """How far the features shift sideways, in pixels; negative to the viewer's left."""
    return {"left": -7.5, "front": 0.0, "right": 7.5}[portrait.facing]


def _sign(portrait: Portrait) -> int:
    return {"left": -1, "front": 0, "right": 1}[portrait.facing]


def _draw_background(canvas: _Canvas, portrait: Portrait) -> None:
    base, accent = background_colours(portrait.background)
    canvas.shape([(0, 0), (SIZE_PX, 0), (SIZE_PX, SIZE_PX), (0, SIZE_PX)], base)
    if portrait.pattern == "dots":
        for row in range(8):
            for column in range(9):
                canvas.oval(column * 16 + 8 * (row % 2), row * 16 + 8, 3.2, 3.2, accent)
    elif portrait.pattern == "stripes":
        for k in range(-8, 9, 2):
            x = k * 16.0
            canvas.shape([(x, 0), (x + 12, 0), (x + 12 + SIZE_PX, SIZE_PX), (x + SIZE_PX, SIZE_PX)], accent)
    elif portrait.pattern == "circle":
        canvas.oval(64, 62, 54, 54, accent)


def _head_outline(portrait: Portrait) -> list[Point]:
    s = 3 * _sign(portrait)
    right = [(64 + s, 30), (80 + s, 34), (88 + s, 50), (87 + s, 66), (80 + s * 1.2, 80), (64 + s * 1.7, 89)]
    left = [(48 + s * 1.2, 80), (41 + s, 66), (40 + s, 50), (48 + s, 34)]
    return [(float(x), float(y)) for x, y in (*right, *left)]


def _draw_back_hair(canvas: _Canvas, portrait: Portrait) -> None:
    shade = hair_colours(portrait.hair)[2]
    s = -2.0 * _sign(portrait)
    if portrait.style == "long":
        half = [(64, 20), (84, 24), (96, 44), (97, 70), (100, 94), (98, 114), (84, 118)]
        canvas.blob([(x + s, y) for x, y in half] + [(128 - x + s, y) for x, y in half[:0:-1]], shade)
    elif portrait.style == "bob":
        half = [(64, 20), (84, 24), (96, 42), (97, 64), (98, 84), (90, 92), (76, 90)]
        canvas.blob([(x + s, y) for x, y in half] + [(128 - x + s, y) for x, y in half[:0:-1]], shade)
    elif portrait.style == "bun":
        canvas.oval(64 + 3 * s, 17, 13, 12, hair_colours(portrait.hair)[0])
        canvas.stroke(_arc(64 + 3 * s, 17, 8, 7, 200, 320), 1.6, shade)
    elif portrait.style == "curly":
        for k in range(13):
            angle = math.radians(160 + k * (380 - 160) / 12)
            canvas.oval(64 + s + 27 * math.cos(angle), 48 + 26 * math.sin(angle), 11, 11, shade)


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    angles = [math.radians(start + (end - start) * k / 16) for k in range(17)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _draw_body(canvas: _Canvas, portrait: Portrait) -> None:
    skin = SKINS[portrait.skin]
    cloth, shade = clothes_colours(portrait.clothes)
    if portrait.garment == "hoodie":
        canvas.blob([(40, 102), (42, 90), (64, 84), (86, 90), (88, 102), (64, 112)], shade)
    canvas.shape([(55, 78), (73, 78), (74, 102), (54, 102)], _darker(skin, 0.14))
    body = _curve(
        [(8, 136), (12, 116), (26, 104), (46, 99), (64, 104), (82, 99), (102, 104), (116, 116), (120, 136)]
    )
    canvas.shape(body, cloth)
    if portrait.garment == "sweater":
        canvas.oval(64, 99, 13.5, 8, shade)
        canvas.oval(64, 97.5, 10.5, 6.5, _darker(skin, 0.14))
        for x in (28, 100):
            canvas.stroke([(x, 117), (x, 132)], 1.6, shade)
    elif portrait.garment == "hoodie":
        canvas.blob(
            [(42, 99), (52, 108), (64, 112), (76, 108), (86, 99), (80, 96), (64, 103), (48, 96)], shade
        )
        pale = _lighter(cloth, 0.75) if portrait.clothes != "white" else _darker(cloth, 0.45)
        canvas.stroke([(56, 108), (55, 123)], 1.8, pale)
        canvas.stroke([(72, 108), (73, 123)], 1.8, pale)
    else:
        canvas.shape([(54, 97), (74, 97), (64, 110)], _darker(skin, 0.14))
        light = _lighter(cloth, 0.35) if portrait.clothes != "white" else _darker(cloth, 0.12)
        canvas.shape([(52, 94), (64, 109), (54, 116), (44, 100)], light)
        canvas.shape([(76, 94), (64, 109), (74, 116), (84, 100)], light)
        for y in (116, 125):
            canvas.oval(64, y, 1.8, 1.8, light)


def _draw_head(canvas: _Canvas, portrait: Portrait) -> None:
    skin = SKINS[portrait.skin]
    s = _sign(portrait)
    for side in (-1, 1):
        if side != s:  # The ear on the far side is hidden.
            x = 64 + side * 24.5 + 3 * s - 2.5 * s
            canvas.oval(x, 64, 5, 7, skin)
            canvas.oval(x, 64, 2.4, 4, _darker(skin, 0.2))
    canvas.blob(_head_outline(portrait), skin)


def _eyes(portrait: Portrait) -> list[tuple[float, float]]:
    """Centre and width factor of the viewer's left and right eye; the one farther away is narrower."""
    turn, s = _turn(portrait), _sign(portrait)
    gap = 11.5 if s == 0 else 10.0
    return [(64 + turn - gap, 0.82 if s < 0 else 1.0), (64 + turn + gap, 0.82 if s > 0 else 1.0)]


def _draw_features(canvas: _Canvas, portrait: Portrait) -> None:
    skin, turn, s = SKINS[portrait.skin], _turn(portrait), _sign(portrait)
    blush = _mix(skin, _BLUSH, 0.28)
    for x, width in _eyes(portrait):
        away = 4.5 if x > 64 + turn else -4.5
        canvas.oval(x + away * width, 72, 5 * width, 3, blush)
        canvas.oval(x, 62, 5.4 * width, 5.6, _WHITE)
        canvas.oval(x + 1.6 * s, 62.4, 3.5 * width, 4, _INK)
        canvas.oval(x + 1.6 * s + 1.2, 60.8, 1.2, 1.3, _WHITE)
        brow = _darker(hair_colours(portrait.hair)[0], 0.35)
        canvas.stroke(_arc(x, 57, 6 * width, 4.5, 215, 325), 1.8, brow)
    nose = _darker(skin, 0.24)
    if s == 0:
        canvas.stroke(_arc(64, 69, 3, 2.4, 20, 160), 1.6, nose)
    else:
        x = 64 + turn + 2 * s
        canvas.stroke([(x, 63), (x + 3.5 * s, 70), (x - 0.5 * s, 71.5)], 1.6, nose)
    mouth_x = 64 + turn + s
    if portrait.smile:
        canvas.shape([*_arc(mouth_x, 76, 7.5, 6.5, 0, 180)], _MOUTH)
        canvas.shape([(mouth_x - 6, 76), (mouth_x + 6, 76), (mouth_x + 5, 78), (mouth_x - 5, 78)], _WHITE)
    else:
        canvas.stroke([(mouth_x - 5.5, 79), (mouth_x + 5.5, 79)], 2.6, _MOUTH)


def _draw_front_hair(canvas: _Canvas, portrait: Portrait) -> None:
    hair, shine, _ = hair_colours(portrait.hair)
    s = _sign(portrait)
    part = -10.0 if s == 0 else 9.0 * s  # Where the parting is; towards the way the face looks.
    crown: list[Point] = [(37, 58), (36, 42), (44, 27), (64, 21), (84, 27), (92, 42), (91, 58)]
    if portrait.style == "curly":
        for k in range(9):
            angle = math.radians(196 + k * (344 - 196) / 8)
            canvas.oval(64 + 24 * math.cos(angle), 47 + 21 * math.sin(angle), 9.5, 9, hair)
        canvas.oval(64, 36, 20, 9, hair)
        for curl_x, curl_y in ((50, 34), (66, 30), (80, 36)):
            canvas.stroke(_arc(curl_x, curl_y, 4, 3.4, 190, 330), 1.6, shine)
        return
    low = {"short": 54.0, "long": 66.0, "bob": 66.0, "bun": 54.0}[portrait.style]
    inner: list[Point] = [(88, low), (85, 50), (64 + part + 16, 45), (64 + part, 37), (64 + part - 12, 45)]
    inner += [(43, 50), (40, low)]
    if portrait.style == "bob":  # A straight fringe.
        inner = [(88, low), (85, 52), (75, 50), (64, 51), (53, 50), (43, 52), (40, low)]
    outline = _curve([*crown], closed=False) + _curve([(91, 58), *inner, (37, 58)], closed=False)
    canvas.shape(outline, hair)
    if portrait.style in ("long", "bob"):
        end = 104.0 if portrait.style == "long" else 86.0
        for side in (-1, 1):
            x = 64 + side * 27.0 + 2.5 * s
            lock: list[Point] = [(x - 3 * side, 50), (x + 2.5 * side, 44), (x + 6 * side, 70)]
            lock += [(x + 5 * side, end), (x - 1 * side, end + 3), (x - 1.5 * side, 72)]
            canvas.blob(lock, hair)
    if portrait.style == "short":
        canvas.blob([(64 + part, 22), (70 + part, 16), (76 + part, 23), (72 + part, 28)], hair)
    canvas.stroke(_arc(64, 47, 21, 18, 215, 262), 2.2, shine)


def _draw_eye_patch(canvas: _Canvas, portrait: Portrait) -> None:
    x, width = _eyes(portrait)[1]
    canvas.stroke([(x, 61), (40, 40)], 3.4, PATCH)
    canvas.stroke([(x, 62), (90, 53)], 3.4, PATCH)
    w = 12 * width
    canvas.blob([(x - w, 55), (x, 51.5), (x + w, 55), (x + w * 0.88, 67), (x, 75), (x - w * 0.88, 67)], PATCH)


def _draw_glasses(canvas: _Canvas, portrait: Portrait) -> None:
    frame: Rgb = (66, 46, 42)
    (left, _), (right, _) = _eyes(portrait)
    for x in (left, right):
        canvas.ring(x, 62.5, 9, 1.7, frame)
    canvas.stroke([(left + 8.5, 61.5), (right - 8.5, 61.5)], 1.6, frame)
    s = _sign(portrait)
    if s >= 0:
        canvas.stroke([(left - 8.5, 61), (41, 59)], 1.6, frame)
    if s <= 0:
        canvas.stroke([(right + 8.5, 61), (87, 59)], 1.6, frame)
