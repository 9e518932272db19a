"""Forwards as a picture: one bar a contender, grouped by size, stacked by part."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from PIL import Image, ImageDraw, ImageFont

from .forward_parts import ATTENTION, LINEARS, PARTS, QUANTISE, REST
from .forward_report import Row
from .report import OK

IDLE = "waiting"
COLORS = {
    LINEARS: (52, 101, 164),
    ATTENTION: (237, 142, 49),
    QUANTISE: (93, 164, 80),
    REST: (147, 112, 171),
    IDLE: (200, 208, 214),
}
"""Of the parts; what no part accounts for is time the GPU waited."""

INK, GRID, PAPER = (30, 30, 30), (225, 225, 225), (255, 255, 255)
WIDTH, MARGIN, LABELS, VALUES = 1200, 24, 300, 150
BAR, GAP, GROUP_GAP, LINE = 22, 8, 18, 30
TEXT_SIZE = 15


def draw(rows: Iterable[Row], path: str) -> None:
    """Writes a PNG file.

    Args:
        rows: those without a time are left out.
        path: of the file.

    Raises:
        OSError: it cannot be written.
    """
    timed = [row for row in rows if row.status == OK and not math.isnan(row.p50_ms)]
    groups: dict[str, list[Row]] = {}
    for row in timed:
        groups.setdefault(row.size, []).append(row)
    font = ImageFont.load_default(TEXT_SIZE)
    height = 2 * MARGIN + 2 * LINE + sum(LINE + GROUP_GAP + len(g) * (BAR + GAP) for g in groups.values())
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN), _title(timed), INK, font)
    _legend(pen, MARGIN + LINE, font)
    scale = (WIDTH - 2 * MARGIN - LABELS - VALUES) / max((row.p50_ms for row in timed), default=1.0)
    y = MARGIN + 2 * LINE
    for size, group in groups.items():
        y += GROUP_GAP
        pen.line((MARGIN, y, WIDTH - MARGIN, y), GRID)
        pen.text((MARGIN, y + 6), size, INK, font)
        y += LINE
        for row in group:
            _bar(pen, row, y, scale, font)
            y += BAR + GAP
    image.save(path, "PNG")


def segments(row: Row) -> Iterator[tuple[str, float]]:
    """The parts of a bar and their milliseconds; together the row's median, or more where the GPU was busy longer."""
    busy = 0.0
    for part in PARTS:
        ms = getattr(row, f"{part}_ms")
        if not math.isnan(ms):
            busy += ms
            yield part, ms
    yield IDLE, max(0.0, row.p50_ms - busy)


def _bar(pen: ImageDraw.ImageDraw, row: Row, y: int, scale: float, font) -> None:
    left = MARGIN + LABELS
    pen.text((left - 10, y + BAR // 2), row.label, INK, font, anchor="rm")
    x = float(left)
    for part, ms in segments(row):
        if ms * scale >= 1:
            pen.rectangle((round(x), y, round(x + ms * scale) - 1, y + BAR), COLORS[part])
        x += ms * scale
    faster = "" if math.isnan(row.speedup_bf16) else f"  {row.speedup_bf16:.2f}x"
    pen.text((x + 8, y + BAR // 2), f"{row.p50_ms:.1f} ms{faster}", INK, font, anchor="lm")


def _legend(pen: ImageDraw.ImageDraw, y: int, font) -> None:
    x = MARGIN
    for part, color in COLORS.items():
        pen.rectangle((x, y + 2, x + 14, y + 16), color)
        pen.text((x + 20, y), part, INK, font)
        x += 40 + int(font.getlength(part))


def _title(rows: list[Row]) -> str:
    if not rows:
        return "nothing was timed"
    row = rows[0]
    what = f"{row.model}, {row.blocks} blocks, batch {row.batch}, {row.text} prompt tokens"
    return f"One forward of {what}: milliseconds (times faster than compiled BF16)"
