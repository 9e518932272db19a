"""bench forward: its arguments, a whole run, wrong results, and contenders that cannot be had."""

import csv
import json
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image

from svdq_compile import options
from svdq_compile.bench import clocks, compile_time, forward, forward_measure, forward_models
from svdq_compile.bench import forward_plan as plans
from svdq_compile.bench.forward_models import Contender
from svdq_compile.cli import _parser, main
from svdq_compile.cli.bench_forward import make_plan
from svdq_compile.errors import OptionError

TINY = ["bench", "forward", "--sizes", "64x48", "--text", "5", "--blocks", "2", "--rank", "8", "--repeats", "2"]
TINY += ["--device", "cpu"]
FP8 = ["--modes", "fp8", "--storage", "packed"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def uncompiled(monkeypatch):
    """Compilation leaves models as they are."""
    monkeypatch.setattr(forward_models, "compile_model", lambda model, contender, plan: model)


def plan_of(*words: str) -> plans.ForwardPlan:
    return make_plan(_parser().parse_args(["bench", "forward", *words]))


def rows_of(file):
    return list(csv.DictReader(file.open()))


def test_the_default_plan():
    assert plan_of() == plans.ForwardPlan()
    assert plan_of("--kernels", "0") == plans.ForwardPlan()


def test_every_option_reaches_the_plan():
    plan = plan_of(
        *("--sizes", "64x48,32x32", "--batch", "2", "--text", "7", "--model", "small", "--blocks", "3", "--rank", "0"),
        *("--modes", "fp8", "--storage", "expanded", "--peers", "none", "--attention", "flash", "--whole", "--dynamic"),
        *("--no-capture", "--lora-cost", "--ablate", "--compile-time", "--repeats", "4", "--kernels", "5"),
        *("--csv", "f", "--chart", "g.png"),
    )
    assert plan == plans.ForwardPlan(
        *(((64, 48), (32, 32)), 2, 7, "small", 3, 0, ("fp8",), ("expanded",), (), "flash", True, True),
        *(False, True, True, True, 4, 5, "f", "g.png"),
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--sizes", "100x64"],
        ["--sizes", "64"],
        ["--peers", "fp4"],
        ["--model", "flux"],
        ["--blocks", "0"],
        ["--kernels", "-1"],
        ["linear"],
    ],
    ids=" ".join,
)
def test_wrong_usage(words):
    with pytest.raises(SystemExit) as left:
        main(["bench", "forward", *words])
    assert left.value.code == 2


def test_a_chart_that_is_no_png():
    with pytest.raises(OptionError, match=r"--chart x\.jpg is no PNG file"):
        plan_of("--chart", "x.jpg")


def test_nothing_to_measure():
    with pytest.raises(OptionError, match="cannot compute"):
        main(["--debug", *TINY, "--modes", "nvfp4", "--storage", "expanded", "--peers", "none"])


def test_the_command_compiles_checks_measures_and_writes(capsys, tmp_path):
    files = ["--csv", str(tmp_path / "rows.csv"), "--chart", str(tmp_path / "chart.png")]
    assert main([*TINY, *FP8, *files, "--peers", "none"]) == 0
    text = capsys.readouterr().out
    assert "the numbers mean nothing" in text
    assert any(line.startswith("64x48      svdq fp8 packed") for line in text.splitlines())
    (row,) = rows_of(tmp_path / "rows.csv")
    assert (row["status"], row["samples"], row["graphs"], row["blocks"]) == ("ok", "2", "1", "2")
    assert 0 < float(row["block_error"]) < 0.01
    assert 0 < float(row["relative_error"]) < 0.01
    assert row["torch"] == torch.__version__
    with Image.open(tmp_path / "chart.png") as image:
        assert image.format == "PNG"


def test_a_wrong_result_is_not_timed_and_fails_the_run(monkeypatch, capsys, tmp_path):
    def wrong(model, contender, plan):
        forward = model.forward
        model.forward = lambda **inputs: (forward(**inputs)[0] * (1.5 if contender.mode == "bf16" else 1.0),)
        return model

    monkeypatch.setattr(forward_models, "compile_model", wrong)
    words = ["--modes", "bf16,fp8", "--storage", "packed", "--peers", "none", "--csv", str(tmp_path / "rows.csv")]
    assert main([*TINY, *words]) == 1
    assert "1 of 2 FAILED" in capsys.readouterr().out
    bf16, fp8 = rows_of(tmp_path / "rows.csv")
    assert (bf16["status"], bf16["p50_ms"]) == ("FAILED", "")
    assert "exceeds" in bf16["note"]
    assert (fp8["status"], fp8["p50_ms"] != "") == ("ok", True)


def test_an_error_of_ours_fails_the_run(monkeypatch, tmp_path):
    def broken(model, contender, plan):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(forward_models, "compile_model", broken)
    assert main([*TINY, *FP8, "--peers", "none", "--csv", str(tmp_path / "rows.csv")]) == 1
    assert rows_of(tmp_path / "rows.csv")[0]["note"] == "RuntimeError: no compiler"


def test_a_peer_that_is_not_installed_is_a_row_with_the_reason(uncompiled, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert main([*TINY, *FP8, "--csv", str(tmp_path / "rows.csv")]) == 0
    bf16, torchao, ours = rows_of(tmp_path / "rows.csv")
    assert (torchao["status"], torchao["p50_ms"]) == ("-", "")
    assert "torchao" in torchao["note"]
    assert bf16["speedup_bf16"] == "1.0"
    assert float(ours["speedup_bf16"]) == pytest.approx(float(bf16["p50_ms"]) / float(ours["p50_ms"]))
    assert ours["speedup_fp8"] == ""


def test_variants_are_rows_and_take_turns_with_the_plain_one(uncompiled, monkeypatch, capsys):
    monkeypatch.setattr(options, "OPTIONAL_PASSES", ("real_rope",))
    assert main([*TINY, *FP8, "--peers", "none", "--lora-cost", "--ablate"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "switched off, in turns" in line) + 1
    for line, variant in zip(lines[start : start + 2], ("rank 0", "no real_rope"), strict=True):
        words = line.split()
        assert words[:6] == ["64x48", "svdq", "fp8", "packed", *variant.split()]
        plain, without, change, percent = map(float, words[6:])
        assert change == pytest.approx(without - plain, abs=0.011)
        assert percent == pytest.approx(100 * change / plain, abs=0.2)


@pytest.mark.parametrize("low_rank", [True, False], ids=["the plain one", "the variant"])
def test_wrong_results_take_no_turns(monkeypatch, capsys, low_rank):
    def wrong(model, contender, plan):
        forward = model.forward
        model.forward = lambda **inputs: (forward(**inputs)[0] * (1.5 if contender.low_rank is low_rank else 1.0),)
        return model

    monkeypatch.setattr(forward_models, "compile_model", wrong)
    assert main([*TINY, *FP8, "--peers", "none", "--lora-cost"]) == 1
    text = capsys.readouterr().out
    assert "1 of 2 FAILED" in text
    assert "in turns" not in text


def test_models_that_do_not_fit_beside_each_other_have_no_turns(uncompiled, monkeypatch, capsys):
    def no_room(run, contender):
        raise torch.OutOfMemoryError("no room")
        yield

    monkeypatch.setattr(forward, "against_plain", no_room)
    assert main([*TINY, *FP8, "--peers", "none", "--lora-cost"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "svdq fp8 packed rank 0 and svdq fp8 packed in turns: OutOfMemoryError: no room" in lines
    assert not any("switched off, in turns" in line for line in lines)


class Handle:
    def __init__(self, model, change=0.0):
        self.model, self.change, self.released = model, change, False
        self.own = model.forward
        model.forward = lambda **inputs: (self.own(**inputs)[0] + change,)

    def report(self):
        return types.SimpleNamespace(pool_nbytes=5e8)

    def release(self):
        self.model.forward, self.released = self.own, True


@pytest.mark.parametrize(("change", "status"), [(0.0, "ok"), (0.5, "FAILED")])
def test_a_captured_model_must_give_the_same_bits(uncompiled, monkeypatch, change, status):
    handles = []

    def capture(model, strict):
        assert strict
        handles.append(Handle(model, change))
        return handles[0]

    monkeypatch.setattr(forward_measure, "capture", capture)
    row, captured = captured_rows()
    assert (row.status, captured.status, captured.how) == ("ok", status, "captured")
    assert (captured.p50_ms > 0) == (status == "ok")
    assert captured.pool_gb == 0.5
    assert handles[0].released


def captured_rows():
    plan = plan_of("--sizes", "64x48", "--text", "5", "--blocks", "2", "--repeats", "1").on("cpu")
    with clocks.ClockMonitor(None) as monitor:
        run = forward_measure.Run(plan, torch.device("cpu"), monitor, lambda *_: None)
        contender = Contender("svdq", "fp8", "packed")
        subject = forward_measure._prepare(run, contender)
        (row,) = forward_measure._measure_size(run, contender, subject, (64, 48))
        inputs = forward_models.make_inputs(subject.model, plan, (64, 48), 5, run.device)
        forward = forward_models.forward_of(subject.model, inputs)
        return row, forward_measure._captured(run, row, subject, forward, forward())


def test_compilation_is_measured_in_processes_with_caches_of_their_own(monkeypatch):
    calls = []

    def process(command, env, **_):
        calls.append((command, env))
        found = {"first_s": 50.0 / len(calls), "size_s": 3.0, "size_graphs": 2, "text_s": 1.0, "text_graphs": 1}
        return subprocess.CompletedProcess(command, 0, f"noise\n{json.dumps(found)}\n", "")

    monkeypatch.setattr(subprocess, "run", process)
    found = compile_time.measure(plans.ForwardPlan(), Contender("svdq", "fp8", "packed"), "cuda")
    assert found == {"cold_s": 50.0, "warm_s": 25.0, "size_s": 3.0, "size_graphs": 2, "text_s": 1.0, "text_graphs": 1}
    (cold, cold_env), (warm, warm_env) = calls
    assert [*cold, compile_time.FIRST] == warm
    folders = [[env[name] for name in compile_time.CACHES] for env in (cold_env, warm_env)]
    assert folders[0] == folders[1]
    assert len(set(folders[0])) == 2


def test_a_process_that_fails_says_why(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\n  ...\nRuntimeError: out of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="out of memory"):
        compile_time.measure(plans.ForwardPlan(), Contender("bf16"), "cpu")


def test_one_process_counts_what_recompiles(monkeypatch):
    def compile_plainly(model, contender, plan):
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        return model

    monkeypatch.setattr(compile_time, "compile_model", compile_plainly)
    plan = plan_of("--sizes", "64x48,64x64", "--text", "5", "--blocks", "2").on("cpu")
    plan = compile_time._plan(json.loads(json.dumps(plans.dataclasses.asdict(plan))))
    ours = Contender("svdq", "fp8", "packed")
    assert compile_time.in_this_process(plan, ours, "cpu", only_first=True).keys() == {"first_s"}
    found = compile_time.in_this_process(plan, ours, "cpu", only_first=False)
    assert found["first_s"] > 0
    assert found["size_graphs"] >= 1
    assert found["text_graphs"] >= 1
    assert compile_time.second_size(plan) == (64, 64)
    assert compile_time.second_size(plan_of("--sizes", "64x48")) == (80, 48)


@pytest.mark.parametrize("what", ["linear", "forward"])
def test_each_benchmark_has_help_and_takes_global_flags(what, capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", what, "--help"])
    assert left.value.code == 0
    assert f"svdq-compile bench {what}:" in capsys.readouterr().out
    assert _parser().parse_args(["bench", what, "--debug", "-v"]).verbose
