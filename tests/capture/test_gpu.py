"""Real CUDA graphs: the uncaptured bits, no memory that grows, no state a failure leaves behind."""

import copy
import functools
import gc
import threading

import pytest
import torch

import svdq_compile
from svdq_compile._compat import list_mode_options
from svdq_compile.errors import CaptureError, OffloadError
from svdq_compile.testing.checkpoints import QWEN_IMAGE, SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [{"text": 5}, {"text": 7}, {"height": 8, "width": 6}, {"batch": 2}]


@pytest.fixture(scope="module")
def loaded():
    return random_transformer(device="cuda")


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture
def capture():
    """``svdq_compile.capture`` with ``strict``, released at the end."""
    handles = []

    def make(model, **options):
        handles.append(svdq_compile.capture(model, **{"strict": True} | options))
        return handles[-1]

    yield make
    for handle in handles:
        handle.release()


def inputs_of(model, seed=0, **sizes):
    """Example inputs with values of a seed."""
    inputs = example_inputs(model, device="cuda", **sizes)
    generator = torch.Generator("cuda").manual_seed(seed)
    for name in ("hidden_states", "encoder_hidden_states", "timestep"):
        inputs[name] = torch.rand(inputs[name].shape, generator=generator, device="cuda").to(inputs[name].dtype)
    return inputs


def memory():
    """Bytes of live tensors, and bytes taken from the GPU for them; without what cuBLAS keeps per stream."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def settle(model, *inputs):
    """Has made what the model keeps of each image size: diffusers' cache of rotary embeddings."""
    for call in inputs:
        model(**call)


def test_bits_in_eager_code(model, loaded, capture):
    handle = capture(model)
    kept = []
    for seed in range(3):
        for sizes in SHAPES:
            inputs = inputs_of(model, seed, **sizes)
            kept.append((model(**inputs)[0], loaded(**inputs)[0]))
    for result, expected in kept:
        assert_bits_equal(result, expected)
    assert [shape.replays for shape in handle.report().shapes] == [3] * len(SHAPES)


def test_only_outputs_live_in_the_pool(model, capture):
    """A tensor some cache had kept from the capture would be overwritten by every replay."""
    handle = capture(model)
    for sizes in SHAPES:
        model(**inputs_of(model, **sizes))
    outputs = {leaf.data_ptr() for entry in handle._entries.values() for leaf in entry._leaves}
    pool = handle._graphs._pool
    blocks = [b for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == pool for b in s["blocks"]]
    assert {b["address"] for b in blocks if b["state"] == "active_allocated"} == outputs


def test_weights_that_change_between_calls(model, loaded, capture, tmp_path):
    other = write_checkpoint(tmp_path, seed=7, rank=32)
    capture(model)
    inputs = inputs_of(model)
    own = loaded(**inputs)[0]
    assert_bits_equal(model(**inputs)[0], own)
    svdq_compile.set_compute(model, "bf16")
    assert_bits_equal(model(**inputs)[0], copy.deepcopy(model)(**inputs)[0])
    svdq_compile.set_compute(model, "auto")
    with svdq_compile.patch(model, other):
        lent = model(**inputs)[0]
        assert_bits_equal(lent, copy.deepcopy(model)(**inputs)[0])
        assert not torch.equal(lent, own)
    assert_bits_equal(model(**inputs)[0], own)
    model.to("cpu")
    blocker = torch.empty(1 << 20, device="cuda")
    model.to("cuda")
    assert_bits_equal(model(**inputs)[0], own)
    svdq_compile.load_into(model, other)
    assert_bits_equal(model(**inputs)[0], lent)
    del blocker


def test_replays_do_not_grow_memory(model, capture):
    capture(model)
    inputs = inputs_of(model)
    expected = model(**inputs)[0]
    before = memory()
    for _ in range(200):
        result = model(**inputs)[0]
    assert_bits_equal(result, expected)
    del result
    assert memory() == before


def test_eviction_and_release_free_memory(model, loaded, capture):
    inputs = [inputs_of(model, height=64, width=64), *(inputs_of(model, text=text) for text in (5, 6, 7))]
    expected = [loaded(**i)[0] for i in inputs]
    settle(model, *inputs)
    before = memory()
    handle = capture(model, max_shapes=3)
    results = [model(**i)[0] for i in inputs[:3]]
    large = handle.report()
    assert large.pool_nbytes > 0
    assert large.shapes[0].pool_nbytes > large.shapes[1].pool_nbytes
    # The fourth shape pushes out the first, for which the pool was as large as it was.
    results.append(model(**inputs[3])[0])
    small = handle.report()
    assert small.evicted == 1
    assert small.pool_nbytes < large.pool_nbytes
    for result, right in zip(results, expected):
        assert_bits_equal(result, right)
    results = [model(**i)[0] for i in inputs]
    for result, right in zip(results, expected):
        assert_bits_equal(result, right)
    del results, result
    handle.release()
    assert handle.report().pool_nbytes == 0
    assert memory() == before
    assert_bits_equal(model(**inputs[0])[0], expected[0])


def test_streams_and_threads(model, loaded, capture):
    """Replays of several streams wait for one another: inputs, pool and outputs are shared."""
    capture(model)
    calls = [inputs_of(model, seed, **sizes) for seed in range(8) for sizes in SHAPES[:2]]
    expected = [loaded(**call)[0] for call in calls]
    for call in calls[:2]:
        model(**call)
    torch.cuda.synchronize()
    results = [None] * len(calls)

    def run(start):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for i in range(start, len(calls), 4):
                results[i] = model(**calls[i])[0]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, right in zip(results, expected):
        assert_bits_equal(result, right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(model, loaded, capture, mode):
    capture(model)
    inputs = inputs_of(model)
    with mode():
        assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])
        assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])


def test_offload_is_refused(model):
    from accelerate import cpu_offload

    with pytest.raises(OffloadError, match="AlignDevicesHook"):
        svdq_compile.capture(cpu_offload(model.to("cpu"), execution_device=torch.device("cuda")))


def test_group_offload_after_capture_runs_uncaptured(model, loaded, capture):
    handle = capture(model, strict=False)
    inputs = inputs_of(model)
    model(**inputs)
    model.to("cpu")
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])
    (reason,) = handle.report().uncaptured
    assert "offload" in reason


def test_what_copies_from_the_host_runs_uncaptured(capture):
    """``zero_cond_t`` and a mask make tensors from Python numbers on each call."""
    model = random_transformer(SMALL | {"zero_cond_t": True}, device="cuda")
    plain = copy.deepcopy(model)
    handle = capture(model, strict=False)
    inputs = inputs_of(model)
    for _ in range(2):
        assert_bits_equal(model(**inputs)[0], plain(**inputs)[0])
    (reason,) = handle.report().uncaptured
    assert "copies from pageable memory at transformer_qwenimage.py:" in reason


def test_a_prompt_mask(model, loaded, capture):
    handle = capture(model, strict=False)
    for ones in (3, 4):
        mask = torch.arange(5, device="cuda")[None] < torch.tensor([[5], [ones]], device="cuda")
        inputs = inputs_of(model, batch=2) | {"encoder_hidden_states_mask": mask}
        assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])
    print(handle.report())


def test_a_failed_capture_leaves_nothing_behind(model, loaded, capture):
    inputs = inputs_of(model)
    settle(model, inputs)
    settle(loaded, inputs)
    handle = capture(model, strict=False)
    forward = model.proj_out.forward

    def synchronising(x):
        torch.cuda.synchronize()
        return forward(x)

    model.proj_out.forward = synchronising
    before = memory()
    for _ in range(2):
        assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])
    assert list(handle.report().uncaptured.values()) == [2]
    assert not torch.cuda.is_current_stream_capturing()
    del model.proj_out.forward
    assert_bits_equal(model(**inputs)[0], loaded(**inputs)[0])
    assert [s.replays for s in handle.report().shapes] == [1]
    handle.release()
    assert memory() == before
    # Allocator and generator are whole.
    torch.empty(1 << 26, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.manual_seed(5)
    first = torch.rand(4, device="cuda")
    torch.cuda.manual_seed(5)
    assert torch.equal(torch.rand(4, device="cuda"), first)


def test_random_numbers_are_refused(model, capture):
    handle = capture(model, strict=False)
    model.proj_out.forward = lambda x: torch.rand_like(x)
    model(**inputs_of(model))
    assert list(handle.report().uncaptured) == ["it draws random numbers"]


@pytest.mark.parametrize("regional", [False, True], ids=["eager", "regional"])
def test_a_denoising_loop_with_guidance(capture, denoise, regional, fresh_dynamo):
    # The pipeline packs 16 channels 2 x 2.
    model = random_transformer(SMALL | {"in_channels": 64, "out_channels": 16}, device="cuda")
    if regional:
        model.compile_repeated_blocks(backend="svdq", fullgraph=True)
    denoise(model, 0, steps=1)
    expected = [denoise(model, seed) for seed in range(2)]
    with capture(model) as handle:
        for seed in range(2):
            assert_bits_equal(denoise(model, seed), expected[seed])
        assert [shape.replays for shape in handle.report().shapes] == [40, 40]
    assert_bits_equal(denoise(model, 0), expected[0])


@pytest.mark.parametrize("storage", ["packed", "expanded"])
def test_the_real_size_denoises(storage, gpu_memory, capture, denoise, fresh_dynamo):
    """60 blocks with guidance: 20 captured steps are the uncaptured ones, and 200 more leave memory as it was."""
    gpu_memory(40)
    model = random_transformer(QWEN_IMAGE, device="cuda", blocks_kept=2, storage=storage)
    model.set_attention_backend("_native_cudnn")
    model.compile_repeated_blocks(backend="svdq", fullgraph=True)
    loop = functools.partial(denoise, model, size=(512, 512), prompts=(128, 64))
    loop(0, steps=1)
    expected = [loop(seed) for seed in range(2)]
    assert all(latents.isfinite().all() for latents in expected)
    assert not torch.equal(*expected)
    with capture(model) as handle:
        for seed in range(2):
            assert_bits_equal(loop(seed), expected[seed])
        before = memory()
        torch.cuda.reset_peak_memory_stats()
        assert_bits_equal(loop(0), expected[0])
        peak = torch.cuda.max_memory_allocated()
        for _ in range(10):
            assert_bits_equal(loop(0), expected[0])
        assert torch.cuda.max_memory_allocated() == peak
        assert memory() == before
        assert [shape.replays for shape in handle.report().shapes] == [260, 260]


def test_bits_of_regional_compilation(model, capture, fresh_dynamo):
    model.compile_repeated_blocks(backend="svdq", fullgraph=True)
    # All of more than 16 tokens: on which side of that a size is would be one more guard.
    shapes = [{"height": 6, "width": 6, "text": 20}, {"height": 8, "width": 6, "text": 24}]
    calls = [inputs_of(model, seed, **sizes) for seed in range(2) for sizes in shapes]
    for call in calls:
        model(**call)
    expected = [model(**call)[0] for call in calls]
    capture(model)
    results = [model(**call)[0] for call in calls]
    for result, right in zip(results, expected):
        assert_bits_equal(result, right)


@pytest.mark.parametrize("how", ["compile", "wrap"])
def test_bits_of_whole_compilation(model, capture, how, fresh_dynamo):
    if how == "compile":
        model.compile(backend="svdq", fullgraph=True)
    else:
        model = torch.compile(model, backend="svdq", fullgraph=True)
    inputs = inputs_of(model)
    expected = model(**inputs)[0]
    capture(model)
    for _ in range(3):
        assert_bits_equal(model(**inputs)[0], expected)


def reduce_overhead():
    """``mode="reduce-overhead"``, but what Inductor cannot capture is an error."""
    return dict(list_mode_options("reduce-overhead")) | {"triton.cudagraph_or_error": True}


@pytest.mark.parametrize("regional", [True, False], ids=["regional", "whole"])
def test_reduce_overhead(model, regional, fresh_dynamo):
    inputs = [inputs_of(model, seed) for seed in range(4)]
    plain = copy.deepcopy(model)
    compiled = []
    for candidate, options in ((plain, None), (model, reduce_overhead())):
        if regional:
            candidate.compile_repeated_blocks(backend="svdq", fullgraph=True, options=options)
        else:
            candidate = torch.compile(candidate, backend="svdq", fullgraph=True, options=options)
        compiled.append(candidate)
    expected = [compiled[0](**call)[0] for call in inputs]
    for _ in range(2):
        for call, right in zip(inputs, expected):
            torch.compiler.cudagraph_mark_step_begin()
            assert_bits_equal(compiled[1](**call)[0].clone(), right)


def test_reduce_overhead_is_not_captured_again(model, capture, fresh_dynamo):
    model.compile_repeated_blocks(backend="svdq", fullgraph=True, mode="reduce-overhead")
    capture(model)
    with pytest.raises(CaptureError, match="reduce-overhead"):
        model(**inputs_of(model))
