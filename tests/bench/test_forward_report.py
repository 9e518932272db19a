"""Rows of whole forwards: their tables, comparisons and CSV lines, and the picture of them."""

import csv
import io

import pytest
from PIL import Image

from svdq_compile.bench import chart, forward, report
from svdq_compile.bench import forward_report as reports
from svdq_compile.bench.forward_parts import ATTENTION, LINEARS, QUANTISE


def row(p50, **changes):
    values = {"model": "qwen-image", "blocks": 60, "height": 1024, "width": 1024, "batch": 1, "text": 128, "rank": 32}
    values |= {"contender": "svdq", "mode": "fp8", "storage": "packed", "p50_ms": p50}
    return reports.Row(**(values | changes))


def profiled(p50, linears, attention, quantise, rest, launches=600, **changes):
    parts = {"linears_ms": linears, "attention_ms": attention, "quantise_ms": quantise, "rest_ms": rest}
    busy = {"gpu_ms": sum(parts.values()), "launches": launches, "launches_per_block": launches / 60}
    return row(p50, **(parts | busy | changes))


BF16 = {"contender": "bf16", "mode": "", "storage": "", "rank": 0}
FP8 = {"contender": "torchao-fp8", "mode": "", "storage": "", "rank": 0}


def test_columns_line_up():
    rows = [row(100.0), row(float("nan"), status=report.FAILED, note="wrong"), row(50.0, how=reports.CAPTURED)]
    for columns in (reports.TIME_COLUMNS, reports.PART_COLUMNS):
        lines = [report.header(columns), *report.table(rows, columns).splitlines()]
        end = lines[0].index("p50 ms") + len("p50 ms")
        assert [line[:end].split()[-1] for line in lines[1:]] == ["100.00", "FAILED", "50.00"]
    assert report.table(rows[1:2], reports.TIME_COLUMNS).endswith("wrong")
    wide = reports.fitted(reports.TIME_COLUMNS, ["a label of some length"])
    assert report.header(wide).index("p20 ms") == report.header(reports.TIME_COLUMNS).index("p20 ms") - 6
    assert rows[2].label == "svdq fp8 packed captured"


def test_speedups_are_over_the_peers_of_the_same_size():
    earlier = [row(30.0, **BF16, height=512), row(200.0, **BF16), row(150.0, **FP8)]
    found = forward.compared(row(100.0), earlier)
    assert (found.speedup_bf16, found.speedup_fp8) == (2.0, 1.5)
    assert forward.compared(row(200.0, **BF16), []).speedup_bf16 == 1.0
    failed = forward.compared(row(100.0, status=report.FAILED), earlier)
    assert failed.speedup_bf16 != failed.speedup_bf16


def test_parts_and_idle_time():
    assert reports.parts_table([row(1.0)]) == ""
    line = reports.parts_table([profiled(100.0, 60, 20, 10, 5)]).splitlines()[1]
    assert line.split()[-9:] == ["100.00", "60.00", "20.00", "10.00", "5.00", "95.00", "5.00", "600", "10.0"]


def test_compile_times():
    assert reports.compile_table([row(1.0)]) == ""
    found = row(1.0, cold_s=50.0, warm_s=10.0, size_s=20.0, size_graphs=2, text_s=0.1, text_graphs=0)
    assert reports.compile_table([row(1.0), found]).splitlines()[1].split()[3:] == [
        *("50.0", "10.0", "20.0", "2", "0.1", "0")
    ]


def test_csv_has_every_field_and_the_environment():
    file = io.StringIO()
    report.CsvFile(file, {"gpu": "H200"}, reports.Row).add([profiled(100.0, 60, 20, 10, 5), row(2.0, note="a, b")])
    first, second = csv.DictReader(io.StringIO(file.getvalue()))
    assert (first["linears_ms"], first["launches_per_block"], first["gpu"]) == ("60", "10.0", "H200")
    assert (second["linears_ms"], second["note"], second["p50_ms"]) == ("", "a, b", "2.0")


def runs(image, y, color):
    """How many pixels of a colour a line of an image holds."""
    return sum(image.getpixel((x, y)) == color for x in range(image.width))


def test_the_chart_has_a_bar_a_row_as_long_as_its_time(tmp_path):
    rows = [
        profiled(200.0, 120, 60, 0, 20, **BF16),
        row(float("nan"), **FP8, status=report.SKIPPED),
        profiled(100.0, 50, 30, 10, 5),
        row(40.0, height=512, width=512),
    ]
    chart.draw(rows, str(tmp_path / "chart.png"))
    with Image.open(tmp_path / "chart.png") as image:
        assert image.format == "PNG"
        picture = image.convert("RGB")
    below_legend = range(chart.MARGIN + 2 * chart.LINE, picture.height)
    counts = {color: {runs(picture, y, color) for y in below_legend} - {0} for color in chart.COLORS.values()}
    scale = max(counts[chart.COLORS[LINEARS]]) / 120
    assert 3 < scale < 5
    # Each length that occurs is one of the rows' own, to a pixel.
    expected = {LINEARS: (120, 50), ATTENTION: (60, 30), QUANTISE: (10,), chart.IDLE: (5, 40)}
    for part, lengths in expected.items():
        found = sorted(counts[chart.COLORS[part]])
        assert found == pytest.approx(sorted(ms * scale for ms in lengths), abs=1.5), part


def test_a_chart_of_nothing_opens(tmp_path):
    chart.draw([], str(tmp_path / "empty.png"))
    with Image.open(tmp_path / "empty.png") as image:
        assert image.width == chart.WIDTH


def test_a_bar_holds_the_whole_time():
    assert dict(chart.segments(profiled(100.0, 60, 20, 10, 5)))[chart.IDLE] == pytest.approx(5.0)
    assert list(chart.segments(row(7.0))) == [(chart.IDLE, 7.0)]
    assert dict(chart.segments(profiled(90.0, 60, 20, 10, 5)))[chart.IDLE] == 0.0
