"""Both ways to time, on a stand-in for torch.cuda, and what is asked of nvidia-smi."""

import contextlib
import os
import time
import types

import pytest
import torch

from svdq_compile.bench import clocks, environment
from svdq_compile.bench import plan as plans
from svdq_compile.bench.runners import GraphRunner
from svdq_compile.bench.timing import Timer, Timing

CPU = torch.device("cpu")


def test_candidates_take_turns_and_failures_are_told():
    turns = []

    def broken():
        raise ValueError("not here")

    timer = Timer(CPU, runs=2)
    times = timer.time({"a": lambda: turns.append("a"), "b": lambda: turns.append("b"), "c": broken}, rounds=2)
    assert list(times) == ["a", "b", "c"]
    assert (len(times["a"].samples), times["a"].method) == (4, "clock")
    assert (times["c"].samples, times["c"].note) == ((), "ValueError: not here")
    assert "".join(turns[2:]) == "aabb" + "bbaa" + "aabb", "after one warm-up each, the first turn does not count"


def test_timing_percentiles():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0, 6.0), "graph")
    assert (timing.at(20), timing.at(50), timing.at(80)) == (2.0, 3.5, 5.0)


class FakeEvent:
    clock = 0

    def __init__(self, enable_timing=False, external=False):
        assert enable_timing
        self.external, self.moment = external, None

    def record(self):
        FakeEvent.clock += 1
        self.moment = FakeEvent.clock

    def elapsed_time(self, end):
        return float(end.moment - self.moment)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Enough of torch.cuda for Timer; ``state.capturing`` is true inside a capture."""
    state = types.SimpleNamespace(capturing=False, replays=0, forgotten=[])

    class Graph:
        def replay(self):
            state.replays += 1

    @contextlib.contextmanager
    def capture(graph, pool, stream):
        state.capturing = True
        try:
            yield
        except RuntimeError:
            raise RuntimeError("capture invalidated")  # noqa: B904, as torch's own does
        finally:
            state.capturing = False

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    properties = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda device: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: stream,
        "synchronize": lambda device: None,
        "get_device_properties": lambda device: properties,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(() if size == ((),) else 4, dtype=dtype))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *pool: state.forgotten.append(pool), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *pool: state.forgotten.append(pool), raising=False)
    state.device = types.SimpleNamespace(type="cuda", index=0)
    return state


@pytest.mark.parametrize("flush", plans.FLUSHES)
def test_a_graph_holds_all_runs(fake_cuda, flush):
    calls = []
    times = Timer(fake_cuda.device, runs=3, flush=flush).time({"a": lambda: calls.append(fake_cuda.capturing)}, 4)["a"]
    assert (times.method, times.note, len(times.samples)) == ("graph", "", 12)
    assert set(times.samples) == {1000.0}
    assert calls == [False] * 3 + [True] * 3, "warm-ups, then one capture"
    assert fake_cuda.replays == 1 + 1 + 4
    assert fake_cuda.forgotten == []


def test_what_cannot_be_captured_runs_on_a_stream(fake_cuda):
    def synchronises():
        if fake_cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    times = Timer(fake_cuda.device, runs=3).time({"a": synchronises, "b": lambda: None}, 2)
    assert (times["a"].method, len(times["a"].samples)) == ("stream", 6)
    assert times["a"].note == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert times["b"].method == "graph"
    assert fake_cuda.forgotten == [(0, (0, 1))] * 2


def test_a_torch_without_external_events_uses_the_stream(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(enable_timing))
    times = Timer(fake_cuda.device, runs=3).time({"a": lambda: None}, 2)["a"]
    assert times.method == "stream"
    assert "external" in times.note


def test_events_of_a_graph_are_external(fake_cuda):
    runner = GraphRunner(lambda: None, 2, lambda: None, None, (0, 1))
    assert all(event.external for pair in runner._events for event in pair)


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Writes a program of that name."""

    def write(body: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return write


def test_clocks_are_read_in_the_background(nvidia_smi):
    nvidia_smi("echo 1980, 2619, 40, 300.5; echo nonsense; echo 1900, 2619, 42, '[N/A]'; exec sleep 60")
    begin = time.monotonic()
    with clocks.ClockMonitor("0") as monitor:
        while len(monitor._readings) < 2 and time.monotonic() < begin + 20:
            time.sleep(0.02)
        found = monitor.since(begin)
        assert monitor.since(time.monotonic()) is None
    assert (found.sm, found.temperature) == (1940.0, 41.0)
    assert "SM 1940 MHz" in str(found)


def test_no_nvidia_smi_is_no_clocks(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with clocks.ClockMonitor("0") as monitor:
        assert monitor.since(0.0) is None
    assert environment.limits("0") == {}


def test_limits(nvidia_smi):
    nvidia_smi("echo 1980, 3201, 700.00")
    assert environment.limits("0") == {"max_sm_mhz": "1980", "max_memory_mhz": "3201", "power_limit_w": "700.00"}
    nvidia_smi("exit 9")
    assert environment.limits("0") == {}


def test_a_gpu_is_named_by_its_uuid(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="ab-c"))
    assert clocks.smi_name(torch.device("cuda:0")) == "GPU-ab-c"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace())
    assert clocks.smi_name(torch.device("cuda:1")) == "1"
    assert clocks.smi_name(CPU) is None
