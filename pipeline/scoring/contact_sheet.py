"""The contact sheet of an evaluation, one PNG: masks over pictures with question and answer, captions, drawn pictures.

A sheet is a title and sections; a section is a heading and a row, or several, of cards:

- MaskCard: the picture, and beside it the predicted masks in colour on a dimmed copy with the true outlines in white.
  The tags <OBJ-i> of the answer become pills in the colour of their mask.
- CaptionCard: the picture, and beside it the caption with the true one below.
- PictureCard: the drawn picture, beside it the one that the text was written for, and the text below.

Drawn with Pillow alone; the same cards give the same bytes. Pictures are uint8 arrays [H,W,3], masks bool arrays [H,W].
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PAPER, INK, SOFT, FAINT, TILE = "#ffffff", "#1f2430", "#6b7280", "#d8dbe2", "#eef0f4"
PALETTE = ("#3b82f6", "#f97316", "#22c55e", "#ec4899", "#8b5cf6", "#14b8a6", "#eab308", "#ef4444")
"""The colour of <OBJ-1>, <OBJ-2>, ...; from the ninth on they repeat."""
MARGIN, GAP, INNER = 40, 22, 8
TEXT, SMALL = 14, 12
LEADING = 1.36
TAG = re.compile(r"<OBJ-(\d+)>")


@dataclass(frozen=True, slots=True)
class MaskCard:
    """A segmentation: predicted masks by number (None: not given), true masks, question, answer, mean IoU."""

    picture: np.ndarray
    predicted: Sequence[np.ndarray | None]
    true: Sequence[np.ndarray]
    question: str
    answer: str
    iou: float | None = None


@dataclass(frozen=True, slots=True)
class CaptionCard:
    """A picture with its caption and the true one."""

    picture: np.ndarray
    caption: str
    reference: str = ""


@dataclass(frozen=True, slots=True)
class PictureCard:
    """A drawn picture (None: the model drew none), its text, the picture the text was written for, the CLIP cosine."""

    picture: np.ndarray | None
    text: str
    reference: np.ndarray | None = None
    cosine: float | None = None


Card = MaskCard | CaptionCard | PictureCard


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a grey line beside it, and cards."""

    heading: str
    note: str = ""
    cards: Sequence[Card] = field(default_factory=tuple)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings this font along, so the sheet looks alike on machines without any.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


def _line_height(size: int) -> int:
    return round(size * LEADING)


def _pill_width(number: str, size: int) -> float:
    return _font(size - 3, bold=True).getlength(number) + 10


def _word_width(word: str, size: int, bold: bool = False) -> float:
    tag = TAG.match(word)
    if tag:
        return _pill_width(tag[1], size) + _font(size, bold).getlength(word[tag.end() :])
    return _font(size, bold).getlength(word)


def wrap(text: str, *, size: int, width: float, most: int, bold: bool = False) -> list[list[str]]:
    """The words of `text` in at most `most` lines of `width` pixels, cut with an ellipsis; <OBJ-i> is one word.

    Words wider than a line are broken.
    """
    words: list[str] = []
    for word in re.findall(r"<OBJ-\d+>[^\s<]*|[^\s<]+|<[^\s<]*", text):
        while _word_width(word, size, bold) > width and len(word) > 1 and not TAG.match(word):
            fits = max(1, int(len(word) * width / _word_width(word, size, bold)))
            words.append(word[:fits])
            word = word[fits:]
        words.append(word)
    space = _font(size, bold).getlength(" ")
    lines: list[list[str]] = []
    used = 0.0
    for word in words:
        wide = _word_width(word, size, bold)
        if lines and used + space + wide <= width:
            lines[-1].append(word)
            used += space + wide
        else:
            lines.append([word])
            used = wide
    if len(lines) > most:
        lines = lines[:most]
        room = width - _font(size, bold).getlength("…")
        while len(lines[-1]) > 1 and sum(_word_width(word, size, bold) + space for word in lines[-1]) - space > room:
            lines[-1].pop()
        last = lines[-1][-1]
        while len(last) > 1 and _word_width(last, size, bold) > room and not TAG.match(last):
            last = last[:-1]
        lines[-1][-1] = last + "…"
    return lines


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Sequence[str]],
    x: int,
    y: int,
    *,
    size: int,
    ink: str,
    bold: bool = False,
) -> int:
    """Draw wrapped lines from (x, y); returns the y below them."""
    font, space = _font(size, bold), _font(size, bold).getlength(" ")
    step = _line_height(size)
    for line in lines:
        at = float(x)
        for word in line:
            tag = TAG.match(word)
            if tag:
                wide = _pill_width(tag[1], size)
                box = (at, y + 1, at + wide - 1, y + size + 3)
                draw.rounded_rectangle(box, radius=(size + 2) // 2, fill=PALETTE[(int(tag[1]) - 1) % len(PALETTE)])
                middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
                draw.text(middle, tag[1], font=_font(size - 3, bold=True), fill=PAPER, anchor="mm")
                at += wide
                word = word[tag.end() :]
            draw.text((at, y), word, font=font, fill=ink)
            at += font.getlength(word) + space
        y += step
    return y


def _fit(picture: np.ndarray, side: int) -> tuple[int, int]:
    """The largest (width, height) of the picture's shape within a square of `side` pixels."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _on_tile(image: Image.Image, side: int) -> Image.Image:
    tile = Image.new("RGB", (side, side), TILE)
    tile.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return tile


def _picture_tile(picture: np.ndarray | None, side: int) -> Image.Image:
    """The picture on a square tile; a tile that says so where there is none."""
    if picture is None:
        tile = Image.new("RGB", (side, side), TILE)
        ImageDraw.Draw(tile).text((side / 2, side / 2), "none", font=_font(SMALL), fill=SOFT, anchor="mm")
        return tile
    size = _fit(picture, side)
    return _on_tile(Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.LANCZOS), side)


def _soft(mask: np.ndarray, shape: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    if mask.shape != shape:
        raise ValueError(
            f"a mask of shape {mask.shape} on a picture of {shape}: masks must have the picture's full size"
        )
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return grey.resize(size, Image.Resampling.BILINEAR)


def _outline(soft: Image.Image, thickness: int) -> Image.Image:
    """The rim just inside a soft mask as an alpha channel."""
    hard = soft.point(lambda value: 255 if value > 127 else 0)
    # A frame of zeros, so that objects cut by the picture's edge get a rim there too.
    framed = Image.new("L", (hard.width + 2, hard.height + 2), 0)
    framed.paste(hard, (1, 1))
    inner = framed.filter(ImageFilter.MinFilter(2 * thickness + 1)).crop((1, 1, hard.width + 1, hard.height + 1))
    return Image.fromarray(np.asarray(hard) & ~np.asarray(inner))


def _mask_tile(card: MaskCard, side: int) -> Image.Image:
    shape = (card.picture.shape[0], card.picture.shape[1])
    size = _fit(card.picture, side)
    grey = np.asarray(
        Image.fromarray(card.picture).convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float32
    )
    canvas = Image.fromarray((grey * 0.42 + 34).astype(np.uint8)).convert("RGB")
    for number, mask in enumerate(card.predicted):
        if mask is None:
            continue
        colour = Image.new("RGB", size, PALETTE[number % len(PALETTE)])
        soft = _soft(mask, shape, size)
        canvas.paste(colour, mask=soft.point(lambda value: round(value * 0.72)))
        canvas.paste(colour, mask=_outline(soft, 1))
    for mask in card.true:
        canvas.paste(Image.new("RGB", size, PAPER), mask=_outline(_soft(mask, shape, size), 1))
    return _on_tile(canvas, side)


def _render(card: Card, width: int) -> Image.Image:
    """The card as an image of `width` pixels, as high as it needs."""
    side = (width - INNER) // 2
    right = side + INNER
    labels: list[str] = []
    if isinstance(card, CaptionCard):
        tiles = [_picture_tile(card.picture, side)]
        room, x, y = width - right - 4, right + 4, 0
        blocks = [(card.caption or "(no caption)", TEXT, INK, 7), (card.reference, SMALL, SOFT, 5)]
    else:
        room, x, y = width, 0, side + 8 + _line_height(SMALL)
        if isinstance(card, MaskCard):
            tiles = [_picture_tile(card.picture, side), _mask_tile(card, side)]
            found = "masks" if any(mask is not None for mask in card.predicted) else "no mask"
            labels = ["picture", found if card.iou is None else f"{found} · IoU {card.iou:.2f}"]
            blocks = [(card.question, SMALL, SOFT, 4), (card.answer or "(no answer)", TEXT, INK, 5)]
        else:
            tiles = [_picture_tile(card.picture, side), _picture_tile(card.reference, side)]
            labels = ["drawn" if card.cosine is None else f"drawn · cosine {card.cosine:.2f}", "the text's own"]
            blocks = [(card.text, TEXT, INK, 5)]
    wrapped = [(wrap(text, size=size, width=room, most=most), size, ink) for text, size, ink, most in blocks if text]
    text_height = sum(len(lines) * _line_height(size) + 4 for lines, size, _ in wrapped)
    image = Image.new("RGB", (width, max(side, y + text_height)), PAPER)
    draw = ImageDraw.Draw(image)
    for left, tile in zip((0, right), tiles):
        image.paste(tile, (left, 0))
    for left, label in zip((0, right), labels):
        draw.text((left, side + 3), label, font=_font(SMALL - 1), fill=SOFT)
    for lines, size, ink in wrapped:
        y = _draw_lines(draw, lines, x, y, size=size, ink=ink) + 4
    return image


def draw_sheet(
    sections: Sequence[Section],
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    columns: int = 5,
    width: int = 1640,
) -> Path:
    """Draw the sheet of `width` pixels with `columns` cards in a row and write it to `path` as PNG; returns the path.

    Sections without cards are left out. Raises ValueError for a mask that has not its picture's size.
    """
    card_width = (width - 2 * MARGIN - (columns - 1) * GAP) // columns
    rows: list[tuple[Section | None, list[Image.Image]]] = []
    for section in sections:
        images = [_render(card, card_width) for card in section.cards]
        for start in range(0, len(images), columns):
            rows.append((section if start == 0 else None, images[start : start + columns]))
    head = MARGIN + 40 + (26 if subtitle else 0)
    height = head + MARGIN
    for opens, images in rows:
        height += (64 if opens else 0) + max(image.height for image in images) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 8), title, font=_font(28, bold=True), fill=INK)
    if subtitle:
        draw.text((MARGIN, MARGIN + 32), subtitle, font=_font(15), fill=SOFT)
    y = head
    for opens, images in rows:
        if opens:
            draw.line((MARGIN, y + 14, width - MARGIN, y + 14), fill=FAINT, width=1)
            draw.text((MARGIN, y + 26), opens.heading, font=_font(18, bold=True), fill=INK)
            beside = MARGIN + _font(18, bold=True).getlength(opens.heading) + 16
            draw.text((beside, y + 30), opens.note, font=_font(SMALL + 1), fill=SOFT)
            y += 64
        for column, image in enumerate(images):
            sheet.paste(image, (MARGIN + column * (card_width + GAP), y))
        y += max(image.height for image in images) + GAP
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside_path = path.with_name(path.name + ".tmp")
    sheet.save(beside_path, format="PNG")
    os.replace(beside_path, path)
    return path
