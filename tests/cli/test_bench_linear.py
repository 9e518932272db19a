"""bench linear: its arguments, its table and CSV file, and its exit code."""

import csv
import io
import math

import pytest
import torch

from svdq_compile.bench import layers, linear, peers, report
from svdq_compile.bench import plan as plans
from svdq_compile.bench.stats import geometric_mean, percentile, ratio
from svdq_compile.cli import _parser, main
from svdq_compile.cli.bench_linear import make_plan
from svdq_compile.errors import OptionError

TINY = ["bench", "linear", "--shapes", "64x48", "--tokens", "5", "--repeats", "2", "--device", "cpu"]


def plan_of(*words: str) -> plans.Plan:
    return make_plan(_parser().parse_args(["bench", "linear", *words]))


def row(**changes) -> report.Row:
    values = {"kind": "linear", "in_features": 3072, "out_features": 3072, "tokens": 4096, "rank": 32}
    return report.Row(**(values | {"candidate": "svdq", "mode": "fp8", "storage": "packed"} | changes))


def test_the_default_plan():
    plan = plan_of()
    assert plan == plans.Plan()
    assert (len(plan.shapes), len(plan.tokens)) == (5, 9)
    assert plan.shapes[:4] == plans.MAIN_SHAPES


def test_every_option_reaches_the_plan():
    plan = plan_of(
        *("--shapes", "64x48,64->48,16x32", "--tokens", "1,7", "--modes", "fp8,bf16", "--storage", "expanded"),
        *("--rank", "0", "--repeats", "3", "--csv", "f", "--dynamic", "--flush", "read"),
    )
    assert plan == plans.Plan(
        ((64, 48), (16, 32)), (1, 7), ("fp8", "bf16"), ("expanded",), 0, True, False, 3, "read", "f"
    )


def test_parts_are_about_many_tokens():
    assert plan_of("--parts").tokens == (4096, 6889)
    assert plan_of("--parts", "--tokens", "64").tokens == (64,)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model"],
        ["linear", "--shapes", "3072"],
        ["linear", "--shapes", "3072x100"],
        ["linear", "--shapes", "0x16"],
        ["linear", "--tokens", "0"],
        ["linear", "--tokens", ","],
        ["linear", "--modes", "int4"],
        ["linear", "--storage", "fp8"],
        ["linear", "--rank", "-1"],
        ["linear", "--flush", "no"],
    ],
    ids=" ".join,
)
def test_wrong_usage(words):
    with pytest.raises(SystemExit) as left:
        main(["bench", *words])
    assert left.value.code == 2


def test_a_mode_no_storage_can_have():
    with pytest.raises(OptionError, match="cannot compute"):
        main(["--debug", *TINY, "--modes", "nvfp4", "--storage", "expanded"])


def test_the_cpu_must_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "linear"]) == 1
    error = capsys.readouterr().err
    assert "no GPU that torch can use (see svdq-compile env)" in error
    advice = error.split("anyway: ")[1].split()
    assert main(["bench", "linear", *advice, "--modes", "bf16", "--repeats", "1"]) == 0


def test_the_command_measures_and_writes(capsys, tmp_path):
    assert main([*TINY, "--modes", "nvfp4", "--csv", str(tmp_path / "rows.csv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["torch", torch.__version__] for line in lines)
    assert any(line.startswith("64->48") and "nvfp4 packed" in line for line in lines)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [r["candidate"] for r in rows] == ["svdq", *peers.PEERS]
    assert rows[0]["torch"] == torch.__version__
    assert int(rows[0]["samples"]) == 20


def test_a_wrong_result_is_not_timed_and_fails_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(linear, "call", lambda *args: layers.call(*args) * 1.5)
    assert main([*TINY, "--modes", "bf16", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert "2 of 5 FAILED" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(r["status"], r["p50_us"] == "") for r in rows[:3]] == [("FAILED", True), ("FAILED", True), ("ok", False)]


def test_percentiles():
    assert [percentile([4.0, 1.0, 3.0, 2.0], p) for p in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert percentile([7.0], 20) == 7.0
    assert math.isnan(percentile([], 50))


def test_geometric_means_and_ratios():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))
    assert math.isnan(geometric_mean([1.0, math.nan]))
    assert ratio(3.0, 2.0) == 1.5
    assert math.isnan(ratio(1.0, 0.0))


def test_columns_line_up():
    rows = [row(p50_us=12.345), row(status=report.FAILED, note="wrong"), row(candidate=peers.BF16, mode="", storage="")]
    for columns in (report.LINEAR_COLUMNS, report.PART_COLUMNS):
        lines = [report.header(columns), *report.table(rows, columns).splitlines()]
        end = lines[0].index("p50 us") + len("p50 us")
        assert [line[:end].split()[-1] for line in lines[1:]] == ["12.3", "FAILED", "-"]
        assert lines[2].endswith("wrong")


def test_csv_has_every_field_and_the_environment():
    file = io.StringIO()
    output = report.CsvFile(file, {"gpu": "H200"})
    output.add([row(p50_us=1.5), row(status=report.FAILED, note="a, b")])
    first, second = csv.DictReader(io.StringIO(file.getvalue()))
    assert (first["p50_us"], first["p20_us"], first["gpu"]) == ("1.5", "", "H200")
    assert (second["status"], second["note"]) == ("FAILED", "a, b")


def test_summary_is_over_large_main_cases():
    rows = [row(speedup_bf16=2.0), row(out_features=9216, speedup_bf16=8.0), row(tokens=64, speedup_bf16=100.0)]
    rows += [row(out_features=18432, speedup_bf16=100.0), row(out_features=12288, status=report.FAILED)]
    found = report.summary(rows).splitlines()[2].split()
    assert found == ["svdq", "fp8", "packed", "2/3", "4.00", "-", "-", "-"]
    assert "no such case" in report.summary(rows[2:4])
