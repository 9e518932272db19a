"""The handle: where it sits, what it keeps, what it gives up, what it refuses and how it says so."""

import contextlib
import copy
import logging
import threading
import time
import warnings

import pytest
import torch

import svdq_compile
from svdq_compile._compat import CUDAGraphTreeManager, cudagraph_tree_runs
from svdq_compile.cuda_graphs.captured import install
from svdq_compile.cuda_graphs.cuda import synchronisations
from svdq_compile.errors import CaptureError, OffloadError
from svdq_compile.testing.checkpoints import example_inputs
from svdq_compile.testing.fake_graphs import FakeGraphs
from svdq_compile.testing.oracle import assert_bits_equal


def call(model, text=5, **sizes):
    return model(**example_inputs(model, text=text, **sizes))[0]


def test_the_model_stays_what_it_is(model, captured):
    before = dict(model.__dict__)
    expected = call(model)
    handle, _ = captured(model)
    assert svdq_compile.capture(model, strict=True) is handle
    assert handle.active
    assert model.dtype == torch.bfloat16
    assert model.config.num_layers == 3
    assert len(model.attn_processors) == 3
    assert "nvfp4" in str(svdq_compile.explain(model)).lower()
    assert_bits_equal(call(model), expected)
    handle.release()
    handle.release()
    assert not handle.active
    # RoPE tables keep following the model.
    assert model.__dict__ == before | {"_modules": model._modules}
    assert_bits_equal(call(model), expected)


def test_a_copy_of_a_captured_model_is_not_captured(model, captured):
    expected = call(model)
    _, graphs = captured(model)
    other = copy.deepcopy(model)
    assert "_compiled_call_impl" not in other.__dict__
    assert_bits_equal(call(other), expected)
    assert graphs.recorded == 0


def test_with_releases(model, captured):
    handle, graphs = captured(model)
    with handle as entered:
        assert entered is handle
        call(model)
        assert len(graphs.recordings) == 1
    assert not handle.active
    assert graphs.recordings == []
    assert graphs.renewed == 1


def test_other_options_are_refused(model, captured):
    captured(model)
    with pytest.raises(CaptureError, match=r"captured already\n  found:  max_shapes=8, strict=True"):
        svdq_compile.capture(model, max_shapes=4)
    wrapped = torch.compile(model)
    with pytest.raises(CaptureError, match="captured already"):
        svdq_compile.capture(wrapped, strict=True)


def test_room_for_nothing_is_refused(model):
    with pytest.raises(CaptureError, match="max_shapes=0"):
        svdq_compile.capture(model, max_shapes=0)


def test_compile_after_capture_takes_its_place(model, captured, fresh_dynamo):
    handle, graphs = captured(model)
    model.compile(backend="eager")
    assert not handle.active
    assert "not active" in repr(handle)
    call(model)
    assert graphs.recorded == 0
    compiled = model._compiled_call_impl
    handle.release()
    assert model._compiled_call_impl is compiled


def test_least_recently_used_goes_first(model, captured):
    handle, graphs = captured(model, max_shapes=2)
    for text in (5, 6, 5, 7):
        call(model, text)
    texts = [shape.arguments for shape in handle.report().shapes]
    assert ["[1, 5, 32]" in texts[0], "[1, 7, 32]" in texts[1]] == [True, True]
    assert handle.report().evicted == 1
    assert len(graphs.recordings) == 2
    call(model, 5)
    assert graphs.recorded == 3
    call(model, 6)
    assert graphs.recorded == 4
    assert graphs.renewed == 0


def test_the_pool_goes_when_most_of_it_was_for_the_evicted(model, captured):
    expected = [call(model, text) for text in (5, 6, 7)]
    handle, graphs = captured(model, max_shapes=2, sizes=(1000, 10, 10, 10))
    call(model, 5)
    call(model, 6)
    assert handle.report().pool_nbytes == 1010
    assert_bits_equal(call(model, 7), expected[2])
    assert graphs.renewed == 1
    assert handle.report().pool_nbytes == 10
    for text, right in zip((5, 6, 7), expected):
        assert_bits_equal(call(model, text), right)


def test_too_little_memory_gives_the_others_up(model, captured):
    expected = [call(model, text) for text in (5, 6, 7)]
    handle, graphs = captured(model, strict=False, room=2)
    for text, right in zip((5, 6, 7), expected):
        assert_bits_equal(call(model, text), right)
    assert len(graphs.recordings) == 1
    assert handle.report().uncaptured == {}
    handle.clear()
    graphs.room = 0
    assert_bits_equal(call(model), expected[0])
    assert handle.report().uncaptured == {"too little memory to capture it": 1}


def test_clear_captures_anew(model, captured):
    handle, graphs = captured(model)
    call(model)
    handle.clear()
    assert handle.active
    assert handle.report().shapes == ()
    call(model)
    assert graphs.recorded == 2


def test_report(model, captured):
    handle, graphs = captured(model, strict=False)
    call(model)
    call(model)
    graphs.refuse = "it waits for the GPU"
    for _ in range(3):
        call(model, 6)
    report = handle.report()
    arguments = (
        "encoder_hidden_states=bfloat16[1, 5, 32], hidden_states=bfloat16[1, 16, 16], img_shapes=[[(1, 4, 4)]], "
        "return_dict=False, timestep=bfloat16[1]"
    )
    assert str(report).splitlines() == [
        "1 of 8 shapes captured, pool 0.0 MB, 0 evicted",
        f"  2 replays, 0.0 MB inputs, 0.0 MB of pool: {arguments}",
        "  3 calls uncaptured: it waits for the GPU",
    ]
    (shape,) = report.shapes
    assert shape.input_nbytes == 2 * (5 * 32 + 16 * 16 + 1)
    assert shape.pool_nbytes == report.pool_nbytes == 100
    assert report.to_dict()["uncaptured"] == {"it waits for the GPU": 3}


def test_a_refusal_is_logged_once_and_not_tried_again(model, captured, caplog):
    expected = call(model)
    _, graphs = captured(model, strict=False, refuse="it waits for the GPU")
    runs = []
    graphs.record = lambda function, record=graphs.record: runs.append(1) or record(function)
    with caplog.at_level(logging.WARNING, "svdq_compile"):
        for _ in range(3):
            assert_bits_equal(call(model), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "QwenImageTransformer2DModel runs uncaptured: it waits for the GPU"
    ]
    assert len(runs) == 1


def test_strict_raises(model, captured):
    captured(model, refuse="it waits for the GPU")
    with pytest.raises(CaptureError, match=r"strict: a call would run uncaptured\n  found:  it waits for the GPU"):
        call(model)


def gradients(model):
    torch.set_grad_enabled(True)


def first_block_cache(model):
    from diffusers import FirstBlockCacheConfig

    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def hook(model):
    model.transformer_blocks[1].register_forward_hook(lambda *_: None)


def group_offload(model):
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )


def adapters(model):
    model.peft_config = {"default": object()}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (gradients, "gradients are on"),
        (first_block_cache, "diffusers' hook 'fbc_leader_block_hook'"),
        (hook, "QwenImageTransformerBlock has forward hooks"),
        (group_offload, "weights are offloaded: diffusers' hook 'group_offloading'"),
        (adapters, "PEFT adapters"),
    ],
)
def test_calls_no_graph_can_serve(model, captured, change, text):
    """Whatever is switched on after the capture runs uncaptured, and stops the moment it is there."""
    handle, graphs = captured(model, strict=False)
    inputs = example_inputs(model)
    model(**inputs)
    with torch.enable_grad() if change is gradients else torch.no_grad():
        change(model)
        if change is not first_block_cache:
            model(**inputs)
        else:
            with model.cache_context("cond"):
                model(**inputs)
    (reason,) = handle.report().uncaptured
    assert text in reason
    assert graphs.recorded == 1
    assert [shape.replays for shape in handle.report().shapes] == [1]


def test_a_cache_that_is_switched_off_again(model, captured):
    handle, _ = captured(model, strict=False)
    for name in ("cond", "uncond"):
        with model.cache_context(name):
            expected = call(model)
    first_block_cache(model)
    with model.cache_context("cond"):
        call(model)
    model.disable_cache()
    with model.cache_context("cond"):
        assert_bits_equal(call(model), expected)
    assert list(handle.report().uncaptured.values()) == [1]


def test_autocast_that_keeps_casts(model, captured):
    handle, graphs = captured(model, strict=False)
    with torch.autocast("cpu", torch.bfloat16):
        call(model)
    assert "autocast keeps casts" in next(iter(handle.report().uncaptured))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        call(model)
    assert graphs.recorded == 1


def test_dispatch_modes_see_every_operator(model, captured):
    from torch.utils.flop_counter import FlopCounterMode

    handle, _ = captured(model, strict=False)
    call(model)
    with FlopCounterMode(display=False) as flops:
        call(model)
    assert flops.get_total_flops() > 0
    assert "TorchDispatchMode" in next(iter(handle.report().uncaptured))


def test_offload_is_refused(model):
    from accelerate import cpu_offload

    group_offload(model)
    with pytest.raises(OffloadError, match=r"found:  diffusers' hook 'group_offloading'.*\n  hint:   keep the"):
        svdq_compile.capture(model)
    other = cpu_offload(torch.nn.Sequential(torch.nn.Linear(2, 2)), execution_device=torch.device("cpu"))
    with pytest.raises(OffloadError, match="accelerate's AlignDevicesHook"):
        svdq_compile.capture(other)


def test_without_a_gpu_everything_runs_uncaptured(model):
    expected = call(model)
    with svdq_compile.capture(model) as handle:
        assert_bits_equal(call(model), expected)
        assert list(handle.report().uncaptured) == ["the model is on cpu; CUDA graphs need a GPU"]


def test_the_models_own_errors_pass_and_leave_a_working_handle(model, captured):
    expected = call(model)
    _, graphs = captured(model)
    inputs = example_inputs(model)
    inputs["hidden_states"] = inputs["hidden_states"][..., :-1]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(**inputs)
    assert "forward" not in model.pos_embed.__dict__
    assert graphs.recorded == 0
    assert_bits_equal(call(model), expected)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[0, 1:]], ids=["whole", "part"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_that_writes_into_its_arguments_is_refused(captured, mode, view):
    class Adder(torch.nn.Linear):
        def forward(self, x):
            view(x).add_(1)
            return super().forward(x)

    model = Adder(2, 2)
    handle, graphs = captured(model, strict=False)
    with mode():
        x, right = torch.zeros(1, 2), torch.zeros(1, 2)
        for _ in range(2):
            view(right).add_(1)
            assert_bits_equal(model(x), torch.nn.functional.linear(right, model.weight, model.bias))
            assert_bits_equal(x, right)
    assert list(handle.report().uncaptured.values()) == [2]
    assert "writes into its arguments" in next(iter(handle.report().uncaptured))
    assert graphs.recordings == []


def test_threads_take_turns(model, captured):
    expected = {text: call(model, text) for text in (5, 6)}
    captured(model)
    right = []

    def run(text):
        with torch.no_grad():
            right.extend(torch.equal(call(model, text), expected[text]) for _ in range(5))

    threads = [threading.Thread(target=run, args=(text,)) for text in (5, 6, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 15


def in_threads(*functions):
    """Runs them side by side and says whether all came to an end."""

    def run(function):
        with torch.no_grad():
            function()

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    return not any(thread.is_alive() for thread in threads)


def test_captures_of_two_models_leave_the_process_as_it_was(captured, monkeypatch):
    """Each puts back what it found; had the other come in between, it would put back the other's."""
    mode = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode[0])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda new: mode.__setitem__(0, 1 if new == "warn" else new))
    before = CUDAGraphTreeManager._run, warnings.showwarning
    both, first_is_done = threading.Barrier(2), threading.Event()
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    handles = []
    for model, first in zip(models, (True, False)):
        handle, graphs = captured(model)
        handles.append(handle)

        def record(function, record=graphs.record, first=first):
            with cudagraph_tree_runs(), synchronisations():
                with contextlib.suppress(threading.BrokenBarrierError):
                    both.wait(timeout=0.5)
                    assert first or first_is_done.wait(timeout=5)
                recording = record(function)
            if first:
                first_is_done.set()
            return recording

        graphs.record = record
    assert in_threads(*(lambda model=model: model(torch.zeros(1, 2)) for model in models))
    assert [len(handle.report().shapes) for handle in handles] == [1, 1]
    assert both.broken
    assert (CUDAGraphTreeManager._run, warnings.showwarning, mode) == (*before, [0])


def test_a_captured_model_in_another_is_called_by_two_threads():
    """Whoever waits for his turn to capture holds no handle that the one who captures may need."""
    inner = torch.nn.Linear(2, 2)
    outer = torch.nn.Sequential(inner)
    x = torch.ones(1, 2)
    expected = inner(x)
    # Not by the fixture: it would wait for these threads if they never end.
    install(inner, 8, True, FakeGraphs(inner))
    graphs = FakeGraphs(outer)
    install(outer, 8, True, graphs)
    recording = threading.Event()
    results = []

    def record(function, record=graphs.record):
        recording.set()
        # The other thread comes as far as it can.
        time.sleep(0.2)
        return record(function)

    def other():
        recording.wait()
        results.append(inner(x))

    graphs.record = record
    assert in_threads(lambda: results.append(outer(x)), other)
    assert_bits_equal(results[0], expected)
    assert_bits_equal(results[1], expected)
