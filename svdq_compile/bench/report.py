"""Measurements as rows: an aligned table on the screen, one line of CSV each, and geometric means."""

from __future__ import annotations

import csv
import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

from .plan import LARGE, MAIN_SHAPES
from .stats import geometric_mean, number, ratio

OK, FAILED, SKIPPED = "ok", "FAILED", "-"
NAN = math.nan


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement. Times in microseconds; NaN where there is none.

    Args:
        kind: ``linear`` or ``part``.
        in_features: K.
        out_features: N.
        tokens: M.
        rank: R.
        candidate: ``svdq``, a peer's name, or a part's.
        mode: compute mode, empty for peers.
        storage: weight storage, empty for peers.
        status: ``ok``; ``FAILED`` for a wrong result; ``-`` for what could not be run.
        p20_us: a fifth of the samples are faster.
        p50_us: the median, from which the following columns are made.
        p80_us: a fifth of the samples are slower.
        samples: how many.
        method: how they were taken (:mod:`svdq_compile.bench.timing`).
        floor_us: least time by the measured roofs.
        limit: ``compute`` or ``memory``, whichever makes the floor.
        tflops: 2 M N K over the median, whatever the arithmetic.
        roof_percent: floor over median.
        speedup_bf16: the BF16 peer's median over this one's.
        speedup_fp8_gemm: the same for the FP8 product alone.
        speedup_fp8_rowwise: the same for the FP8 linear that quantises its activation.
        relative_error: ``||y - oracle|| / ||oracle||``.
        sm_mhz: median clock while the case was measured.
        temperature_c: likewise.
        power_w: likewise.
        note: why something failed or was skipped, or how a peer works.
    """

    kind: str
    in_features: int
    out_features: int
    tokens: int
    rank: int
    candidate: str
    mode: str = ""
    storage: str = ""
    status: str = OK
    p20_us: float = NAN
    p50_us: float = NAN
    p80_us: float = NAN
    samples: int = 0
    method: str = SKIPPED
    floor_us: float = NAN
    limit: str = ""
    tflops: float = NAN
    roof_percent: float = NAN
    speedup_bf16: float = NAN
    speedup_fp8_gemm: float = NAN
    speedup_fp8_rowwise: float = NAN
    relative_error: float = NAN
    sm_mhz: float = NAN
    temperature_c: float = NAN
    power_w: float = NAN
    note: str = ""

    @property
    def shape(self) -> str:
        return f"{self.in_features}->{self.out_features}"

    @property
    def label(self) -> str:
        """What was measured, in one to three words."""
        return " ".join(part for part in (self.candidate, self.mode, self.storage) if part)

    @property
    def remark(self) -> str:
        """The note, and the method where it is not the usual one."""
        unusual = self.method if self.method not in ("graph", SKIPPED) else ""
        return "; ".join(part for part in (unusual, self.note) if part)


Column = tuple[str, int, Callable[[Any], str]]
"""Title, width and cell; a negative width aligns left."""


def _time(name: str) -> Callable[[Row], str]:
    return lambda row: FAILED if row.status == FAILED and name == "p50_us" else number(getattr(row, name), 1)


_CASE: tuple[Column, ...] = (
    ("in->out", -12, lambda row: row.shape),
    ("tokens", 6, lambda row: str(row.tokens)),
    ("what", -26, lambda row: row.label),
    ("p20 us", 9, _time("p20_us")),
    ("p50 us", 9, _time("p50_us")),
    ("p80 us", 9, _time("p80_us")),
)

LINEAR_COLUMNS: tuple[Column, ...] = (
    *_CASE,
    ("TFLOP/s", 8, lambda row: number(row.tflops, 1)),
    ("% roof", 8, lambda row: number(row.roof_percent, 0) + (row.limit[:1] if row.roof_percent > 0 else "")),
    ("x bf16", 7, lambda row: number(row.speedup_bf16, 2)),
    ("x fp8mm", 7, lambda row: number(row.speedup_fp8_gemm, 2)),
    ("x fp8row", 8, lambda row: number(row.speedup_fp8_rowwise, 2)),
    ("error", 8, lambda row: SKIPPED if math.isnan(row.relative_error) else f"{row.relative_error:.1e}"),
    ("SM MHz", 6, lambda row: number(row.sm_mhz, 0)),
    ("note", -4, lambda row: textwrap.shorten(row.remark, 60, placeholder=" ...")),
)

PART_COLUMNS: tuple[Column, ...] = (
    *_CASE,
    ("floor us", 9, lambda row: number(row.floor_us, 1)),
    ("x floor", 7, lambda row: number(ratio(row.p50_us, row.floor_us), 2)),
    ("limit", -7, lambda row: row.limit),
    ("TFLOP/s", 8, lambda row: number(row.tflops, 1)),
    ("SM MHz", 6, lambda row: number(row.sm_mhz, 0)),
    ("note", -4, lambda row: textwrap.shorten(row.remark, 60, placeholder=" ...")),
)


def line(cells: Iterable[str], columns: Sequence[Column]) -> str:
    """Cells in their columns, two blanks between them."""
    pairs = zip(cells, columns)
    return "  ".join(c.ljust(-width) if width < 0 else c.rjust(width) for c, (_, width, _) in pairs).rstrip()


def header(columns: Sequence[Column]) -> str:
    """The titles."""
    return line((title for title, _, _ in columns), columns)


def table(rows: Iterable[Any], columns: Sequence[Column]) -> str:
    """One line a row, without titles."""
    return "\n".join(line((cell(row) for _, _, cell in columns), columns) for row in rows)


class CsvFile:
    """Writes every row as soon as it is known, so that an interrupted run leaves what it had.

    Args:
        file: open for writing.
        environment: columns every row gets, after its own.
        kind: the rows' dataclass.
    """

    def __init__(self, file: IO[str], environment: Mapping[str, str], kind: type = Row):
        self._file, self._environment = file, environment
        names = [field.name for field in dataclasses.fields(kind)] + list(environment)
        self._writer = csv.DictWriter(file, names, lineterminator="\n")
        self._writer.writeheader()
        file.flush()

    def add(self, rows: Iterable[Any]) -> None:
        """Writes rows; NaN becomes an empty cell."""
        for row in rows:
            cells = dataclasses.asdict(row) | dict(self._environment)
            empty = {name: "" for name, value in cells.items() if isinstance(value, float) and math.isnan(value)}
            self._writer.writerow(cells | empty)
        self._file.flush()


def summary(rows: Iterable[Row]) -> str:
    """Geometric means over the main shapes at :data:`~svdq_compile.bench.plan.LARGE` tokens or more, per candidate."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.kind == "linear" and row.tokens >= LARGE and (row.in_features, row.out_features) in MAIN_SHAPES:
            groups.setdefault(row.label, []).append(row)
    title = f"geometric means, tokens >= {LARGE}, {', '.join(f'{k}->{n}' for k, n in MAIN_SHAPES)}"
    if not groups:
        return f"{title}: no such case"
    lines = [title, f"{'what':26}  {'cases':>7}  {'x bf16':>7}  {'x fp8mm':>7}  {'x fp8row':>8}  {'% roof':>6}"]
    fields = (("speedup_bf16", 7, 2), ("speedup_fp8_gemm", 7, 2), ("speedup_fp8_rowwise", 8, 2), ("roof_percent", 6, 0))
    for label, found in groups.items():
        timed = [row for row in found if row.status == OK]
        means = (
            number(geometric_mean(getattr(row, name) for row in timed), digits).rjust(width)
            for name, width, digits in fields
        )
        lines.append(f"{label:26}  {f'{len(timed)}/{len(found)}':>7}  " + "  ".join(means))
    return "\n".join(lines)
