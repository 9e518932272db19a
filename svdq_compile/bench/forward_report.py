"""Measured forwards as rows: tables on the screen and one line of CSV each."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Sequence

from .forward_parts import PARTS
from .report import FAILED, OK, SKIPPED, Column, header, table
from .stats import number

NAN = math.nan
COMPILED, CAPTURED = "compiled", "captured"


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender at one size. NaN where there is no number.

    Args:
        model: ``qwen-image`` or ``small``.
        blocks: of the transformer.
        height: of the image in pixels.
        width: of the image in pixels.
        batch: images.
        text: prompt tokens.
        rank: R; 0 for peers and without low-rank branches.
        contender: ``svdq`` or a peer's name.
        mode: compute mode, empty for peers.
        storage: weight storage, empty for peers.
        variant: what was switched off, empty for nothing.
        how: ``compiled``, or ``captured`` in a CUDA graph on top.
        status: ``ok``; ``FAILED`` for a wrong result; ``-`` for what could not be run.
        p20_ms: a fifth of the forwards are faster.
        p50_ms: the median.
        p80_ms: a fifth of the forwards are slower.
        samples: forwards timed.
        gpu_ms: of one forward, the GPU was busy so long; the parts sum up to it.
        linears_ms: products of linears.
        attention_ms: attention.
        quantise_ms: smoothing, quantising, down-projection, unpacking.
        rest_ms: everything else.
        launches: kernels, copies and fills of one forward.
        launches_per_block: the same over the blocks.
        speedup_bf16: the BF16 peer's median at this size over this one's.
        speedup_fp8: the same for torchao FP8.
        weights_gb: parameters and buffers.
        peak_gb: most memory allocated during a forward, weights included.
        pool_gb: of a captured one, the pool of its graph.
        first_s: seconds until the first result, compilation included.
        graphs: that Dynamo compiled for it.
        cold_s: seconds of the first forward of a process whose caches of compiled code are empty.
        warm_s: the same in a process after it.
        size_s: seconds of the first forward with another image size, in the cold process.
        size_graphs: that Dynamo compiled for it.
        text_s: seconds of the first forward with another prompt length after that.
        text_graphs: that Dynamo compiled for it.
        block_error: ``||y - oracle|| / ||oracle||`` of two blocks against float64.
        relative_error: of ours, the same of all blocks against the kernels run one by one.
        sm_mhz: median clock meanwhile.
        temperature_c: likewise.
        power_w: likewise.
        note: why something failed or was skipped.
    """

    model: str
    blocks: int
    height: int
    width: int
    batch: int
    text: int
    rank: int
    contender: str
    mode: str = ""
    storage: str = ""
    variant: str = ""
    how: str = COMPILED
    status: str = OK
    p20_ms: float = NAN
    p50_ms: float = NAN
    p80_ms: float = NAN
    samples: int = 0
    gpu_ms: float = NAN
    linears_ms: float = NAN
    attention_ms: float = NAN
    quantise_ms: float = NAN
    rest_ms: float = NAN
    launches: float = NAN
    launches_per_block: float = NAN
    speedup_bf16: float = NAN
    speedup_fp8: float = NAN
    weights_gb: float = NAN
    peak_gb: float = NAN
    pool_gb: float = NAN
    first_s: float = NAN
    graphs: float = NAN
    cold_s: float = NAN
    warm_s: float = NAN
    size_s: float = NAN
    size_graphs: float = NAN
    text_s: float = NAN
    text_graphs: float = NAN
    block_error: float = NAN
    relative_error: float = NAN
    sm_mhz: float = NAN
    temperature_c: float = NAN
    power_w: float = NAN
    note: str = ""

    @property
    def size(self) -> str:
        return f"{self.height}x{self.width}"

    @property
    def label(self) -> str:
        """What was measured, in one to five words."""
        how = "" if self.how == COMPILED else self.how
        return " ".join(part for part in (self.contender, self.mode, self.storage, self.variant, how) if part)


def _time(name: str):
    return lambda row: FAILED if row.status == FAILED and name == "p50_ms" else number(getattr(row, name), 2)


def _number(name: str, digits: int):
    return lambda row: number(getattr(row, name), digits)


def _error(name: str):
    return lambda row: SKIPPED if math.isnan(getattr(row, name)) else f"{getattr(row, name):.1e}"


_CASE: tuple[Column, ...] = (
    ("size", -9, lambda row: row.size),
    ("what", -28, lambda row: row.label),
)

TIME_COLUMNS: tuple[Column, ...] = (
    *_CASE,
    ("p20 ms", 8, _time("p20_ms")),
    ("p50 ms", 8, _time("p50_ms")),
    ("p80 ms", 8, _time("p80_ms")),
    ("x bf16", 6, _number("speedup_bf16", 2)),
    ("x fp8", 6, _number("speedup_fp8", 2)),
    ("weights GB", 10, _number("weights_gb", 2)),
    ("peak GB", 7, _number("peak_gb", 2)),
    ("pool GB", 7, _number("pool_gb", 2)),
    ("first s", 7, _number("first_s", 1)),
    ("graphs", 6, _number("graphs", 0)),
    ("2 blocks", 8, _error("block_error")),
    ("error", 8, _error("relative_error")),
    ("SM MHz", 6, _number("sm_mhz", 0)),
    ("note", -4, lambda row: textwrap.shorten(row.note, 90, placeholder=" ...")),
)

PART_COLUMNS: tuple[Column, ...] = (
    *_CASE,
    ("p50 ms", 8, _time("p50_ms")),
    *((part, 9, _number(f"{part}_ms", 2)) for part in PARTS),
    ("GPU ms", 8, _number("gpu_ms", 2)),
    ("idle ms", 8, lambda row: number(row.p50_ms - row.gpu_ms, 2)),
    ("launches", 8, _number("launches", 0)),
    ("a block", 7, _number("launches_per_block", 1)),
)

COMPILE_COLUMNS: tuple[Column, ...] = (
    ("what", -28, lambda row: row.label),
    ("cold s", 7, _number("cold_s", 1)),
    ("warm s", 7, _number("warm_s", 1)),
    ("second size s", 13, _number("size_s", 1)),
    ("graphs", 6, _number("size_graphs", 0)),
    ("second prompt s", 15, _number("text_s", 1)),
    ("graphs", 6, _number("text_graphs", 0)),
)


def fitted(columns: Sequence[Column], labels: Iterable[str]) -> tuple[Column, ...]:
    """Columns whose second, the label, is wide enough for all labels."""
    title, _, cell = columns[1]
    return (columns[0], (title, -max(map(len, (title, *labels))), cell), *columns[2:])


def parts_table(rows: Iterable[Row]) -> str:
    """Where each forward's time goes; empty if nothing was profiled."""
    found = [row for row in rows if not math.isnan(row.gpu_ms)]
    return _table_of(found, fitted(PART_COLUMNS, (row.label for row in found)))


def compile_table(rows: Iterable[Row]) -> str:
    """How long compilation took in processes of their own; empty if that was not measured."""
    return _table_of([row for row in rows if not math.isnan(row.cold_s)], COMPILE_COLUMNS)


def _table_of(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    return f"{header(columns)}\n{table(rows, columns)}" if rows else ""
