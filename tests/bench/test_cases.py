"""Layers, the gate, the work that is counted, and the rows of a case."""

import math

import pytest
import torch

from svdq_compile.bench import clocks, gate, linear, measure, peers, report, roofs
from svdq_compile.bench import plan as plans
from svdq_compile.bench.layers import call, make_layer
from svdq_compile.bench.timing import Timer
from svdq_compile.ops.modes import FP8_MIN_TOKENS

CPU = torch.device("cpu")


@pytest.fixture
def bench():
    found = roofs.Roofs(bf16=1e12, fp8=2e12, bandwidth=1e11)
    with clocks.ClockMonitor(None) as monitor:
        yield measure.Bench(Timer(CPU, runs=1), found, 1, monitor, (("nvfp4", "packed"), ("fp8", "expanded")))


def test_floors():
    found = roofs.Roofs(bf16=1e12, fp8=2e12, bandwidth=1e11)
    assert found.floor(roofs.Work(bf16=1e6, fp8=2e6)) == (pytest.approx(2.0), "compute")
    assert found.floor(roofs.Work(bf16=1e6, bytes=1e6)) == (pytest.approx(10.0), "memory")
    unknown = roofs.Roofs(bf16=1e12, fp8=math.nan, bandwidth=1e11)
    assert math.isnan(unknown.floor(roofs.Work(fp8=1.0, bytes=1e6))[0])
    assert unknown.floor(roofs.Work(bf16=1e6, bytes=1e6))[1] == "memory"


@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_dense_weight_is_what_the_layer_approximates(rank, dynamic):
    layer = make_layer((256, 96), rank, dynamic, CPU)
    x = layer.activations(64)
    expected = x.float() @ layer.dense.float().t() + layer.bias.float()
    for storage, mode in (("packed", "nvfp4"), ("packed", "bf16"), ("expanded", "fp8")):
        y = call(x, layer.stored(storage), layer.bias, mode).float()
        assert (y - expected).norm() / expected.norm() < (0.03 if mode == "bf16" else 0.2)


def test_activations_have_outliers_and_are_reproducible():
    layer = make_layer((2048, 16), 4, False, CPU)
    x = layer.activations(64)
    size = x.float().pow(2).mean(0).sqrt()
    assert size.max() > 8 * size.median()
    assert torch.equal(x, layer.activations(64))


@pytest.mark.parametrize("mode", plans.MODES)
def test_the_gate_passes_the_operator_and_refuses_what_lacks_something(mode):
    layer = make_layer((256, 96), 8, False, CPU)
    x = layer.activations(300)
    w, bias = layer.packed, layer.bias
    y = call(x, w, bias, mode)
    assert gate.judge(y, x, w, bias, mode).passed
    parts = w.parts() | {"lora_up": torch.zeros_like(w.lora_up)}
    without_low_rank = call(x, type(w)(parts, w.fingerprint, w.dtype), bias, mode)
    one_row_missing = y.clone()
    one_row_missing[-1] = math.nan
    for wrong in (without_low_rank, call(x, w, None, mode), y * 1.1, one_row_missing, y.float(), y[:-1]):
        verdict = gate.judge(wrong, x, w, bias, mode)
        assert not verdict.passed
        assert verdict.reason


def test_bf16_products_round_operands_and_results():
    a, b = torch.randn(8, 32), torch.randn(4, 32)
    with gate.Bf16Products():
        y = torch.nn.functional.linear(a, b)
    assert y.dtype == torch.float32
    assert torch.equal(y, (a.bfloat16() @ b.bfloat16().t()).float())


def test_rows_hold_the_last_one():
    assert gate.pick_rows(7, CPU).tolist() == list(range(7))
    rows = gate.pick_rows(6889, CPU)
    assert len(rows.unique()) == gate.ROWS
    assert rows[-1] == 6888


def test_a_case_compares_the_operator_with_its_peers(bench):
    layer = make_layer((64, 48), 8, False, CPU)
    rows = {found.label: found for found in linear.measure(bench, layer, 200)}
    assert list(rows) == ["svdq nvfp4 packed", "svdq fp8 expanded", *peers.PEERS]
    ours = rows["svdq nvfp4 packed"]
    assert ours.status == report.OK
    assert ours.speedup_bf16 == pytest.approx(rows[peers.BF16].p50_us / ours.p50_us)
    assert rows[peers.BF16].speedup_bf16 == 1.0
    assert ours.roof_percent == pytest.approx(100 * ours.floor_us / ours.p50_us)
    assert ours.relative_error < 0.01


def test_work_of_the_operator():
    layer = make_layer((64, 48), 8, False, CPU)
    product, low_rank = 2.0 * 200 * 64 * 48, 2.0 * 200 * 8 * (64 + 48)
    assert linear.operator_work(layer, "fp8", "packed", 200).fp8 == product
    assert linear.operator_work(layer, "fp8", "packed", FP8_MIN_TOKENS - 1).fp8 == 0.0
    work = linear.operator_work(layer, "nvfp4", "packed", 200)
    assert (work.bf16, work.fp8) == (product + low_rank, 0.0)
    assert linear.operator_work(layer, "bf16", "expanded", 200).bytes > work.bytes


def test_an_operator_that_raises_fails(monkeypatch, bench):
    def broken(*args):
        raise RuntimeError("no such kernel\nlong story")

    monkeypatch.setattr(linear, "call", broken)
    first = linear.measure(bench, make_layer((64, 48), 8, False, CPU), 5)[0]
    assert (first.status, first.note) == (report.FAILED, "RuntimeError: no such kernel")


def test_a_peer_that_cannot_run_leaves_a_dash(monkeypatch, bench):
    def refuse(*args, **kwargs):
        raise RuntimeError("mat2 must be divisible by 16")

    monkeypatch.setattr(peers, "scaled_mm", refuse)
    rows = {found.candidate: found for found in linear.measure(bench, make_layer((64, 48), 8, False, CPU), 5)}
    assert rows[peers.FP8_GEMM].status == report.SKIPPED
    assert "divisible" in rows[peers.FP8_GEMM].note
    assert math.isnan(rows["svdq"].speedup_fp8_gemm)
    assert rows[peers.BF16].status == report.OK
