"""Contact sheets: pictures in labelled rows and columns, with a line of text below each."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .denoise import DenoisingRun, Pictures

BACKGROUND = (232, 232, 232)
LABEL_CHARACTERS = 36
"""A row's label is broken into lines of at most so many characters."""


def contact_sheet(
    columns: Sequence[Sequence[Image.Image]],
    headings: Sequence[str],
    labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    *,
    scale: int = 1,
) -> Image.Image:
    """A sheet of pictures of one size.

    Args:
        columns: the pictures of each column, from top to bottom.
        headings: one for each column.
        labels: one for each row.
        captions: what stands below each picture, arranged as the pictures are; None for nothing.
        scale: pictures are enlarged so many times, by whole pixels.

    Raises:
        ValueError: the pictures are of several sizes, or there are not as many headings, labels or captions.
    """
    sizes = {image.size for column in columns for image in column}
    if len(sizes) != 1:
        raise ValueError(f"pictures of one size are needed, not {sorted(sizes)}")
    width, height = (side * scale for side in sizes.pop())
    texts = [[""] * len(labels)] * len(columns) if captions is None else captions
    font = ImageFont.load_default(max(16, width // 24))
    line = round(font.size * 1.75)
    gap = font.size // 2
    lower = gap if captions is None else line
    label_lines = ["\n".join(textwrap.wrap(label, LABEL_CHARACTERS)) for label in labels]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    side = 2 * gap + _widest(pen, font, label_lines)
    across = gap + max(width, _widest(pen, font, [*headings, *(text for column in texts for text in column)]))
    down = height + lower

    sheet = Image.new("RGB", (side + across * len(columns), line + down * len(labels)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for x, (column, heading, below) in enumerate(zip(columns, headings, texts, strict=True)):
        middle = side + x * across + (across - gap) // 2
        pen.text((middle, line // 2), heading, "black", font, "mm")
        for y, (image, text, _) in enumerate(zip(column, below, labels, strict=True)):
            top = line + y * down
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (middle - width // 2, top))
            pen.text((middle, top + height + line // 2), text, "black", font, "mm")
    for y, text in enumerate(label_lines):
        pen.multiline_text((gap, line + y * down + height // 2), text, "black", font, "lm")
    return sheet


def compared_sheet(run: DenoisingRun, others: Sequence[Pictures]) -> Image.Image:
    """A run's own pictures in the first column, then others', each with its figures below.

    Small pictures are enlarged until their captions fit.
    """
    plan = run.plan
    labels = [
        prompt if len(plan.seeds) == 1 else f"seed {seed}" if len(plan.prompts) == 1 else f"{prompt}, seed {seed}"
        for prompt, seed in plan.pictures
    ]
    return contact_sheet(
        [run.images, *(pictures.images for pictures in others)],
        [run.name, *(pictures.name for pictures in others)],
        labels,
        [[""] * len(labels), *([str(row) for row in pictures.rows] for pictures in others)],
        scale=max(1, 192 // run.images[0].width),
    )


def _widest(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, texts: Sequence[str]) -> int:
    """Pixels the widest of some texts takes."""
    return max(round(pen.multiline_textbbox((0, 0), text, font)[2]) for text in texts)
