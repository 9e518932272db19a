"""Which calls share a graph: everything that changes what is computed makes another one, nothing else does."""

import copy
import gc
import weakref

import pytest
import torch

import svdq_compile
from svdq_compile.cuda_graphs.arguments import read
from svdq_compile.cuda_graphs.refusal import Refused
from svdq_compile.cuda_graphs.state import ModelState, environment
from svdq_compile.testing.checkpoints import example_inputs

CPU = torch.device("cpu")


def key(*args, **kwargs):
    return read(args, kwargs, CPU).key


def test_values_and_keyword_order_do_not_count():
    a, b = torch.zeros(2, 3), torch.ones(2, 3)
    assert key(a, x=b, y=[(1, 4, 4)]) == key(b, y=[(1, 4, 4)], x=a)
    assert hash(key(a, x=b)) == hash(key(b, x=a))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3), torch.zeros(3, 2).t()),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(5)[:4], torch.zeros(5)[1:]),
        (torch.zeros(2, 3), torch.zeros(2, 1).expand(2, 3)),
        ([(1, 4, 4)], [(1, 4, 5)]),
        ([(1, 4, 4)], [[1, 4, 4]]),
        ([(1, 4, 4)], [(1, 4, 4)] * 2),
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        (None, False),
        ({"scale": 1.0}, {"scale": 0.5}),
        ({}, None),
        (torch.zeros(2), None),
        ("a", b"a"),
    ],
    ids=str,
)
def test_what_counts(left, right):
    assert key(x=left) != key(x=right)
    assert key(x=left) == key(x=left)


def test_a_float_that_is_not_a_number_equals_itself():
    assert key(x=float("nan")) == key(x=float("nan"))


def test_tensors_are_found_in_order_and_replaced():
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    call = read(([a, (1, b)],), {"z": {"c": c}, "k": 7}, CPU)
    assert [t.numel() for t in call.tensors] == [1, 2, 3]
    args, kwargs = call.replace((c, a, b))
    assert args[0][0] is c
    assert args[0][1][1] is a
    assert kwargs["z"]["c"] is b
    assert kwargs["k"] == 7
    assert str(call) == "0=[tensor([0.]), (1, tensor([1., 1.]))], k=7, z={'c': tensor([1., 1., 1.])}"


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, device="meta"), "argument x is on meta, the model on cpu"),
        (torch.zeros(2).to_sparse(), "argument x is a Tensor of layout torch.sparse_coo"),
        ([Odd()], r"argument x\[0\] is a Odd, whose contents cannot be compared"),
        ({"a": {1, 2}}, r"argument x\['a'\] is a set"),
    ],
    ids=["device", "layout", "object", "set"],
)
def test_refused_arguments(value, text):
    with pytest.raises(Refused, match=text):
        key(x=value)


def changes(model, change):
    """Whether a change makes another key, and undone makes the first one again."""
    state = ModelState(model)
    before = state.key()
    assert state.key() is before
    undo = change(model)
    after = state.key()
    assert ModelState(model).key() == after
    if undo is not None:
        undo()
        assert state.key() == before
        assert hash(state.key()) == hash(before)
    return after != before


def set_compute(model):
    svdq_compile.set_compute(model, "bf16")
    return lambda: svdq_compile.set_compute(model, "auto")


def new_weight(model):
    linear = model.proj_out
    old, linear.weight = linear.weight, torch.nn.Parameter(linear.weight.detach().clone(), requires_grad=False)
    return lambda: setattr(linear, "weight", old)


def new_data(model):
    old, model.proj_out.weight.data = model.proj_out.weight.data, model.proj_out.weight.data.clone()
    return lambda: setattr(model.proj_out.weight, "data", old)


def data_laid_out_anew(model):
    square = (p for p in model.parameters() if type(p.data) is torch.Tensor and p.dim() == 2 and p.shape == p.t().shape)
    weight = next(square)
    old, weight.data = weight.data, weight.data.t()
    return lambda: setattr(weight, "data", old)


def new_part(model):
    weight = model.transformer_blocks[1].attn.to_q.weight
    old, weight.qweight = weight.qweight, weight.qweight.clone()
    return lambda: setattr(weight, "qweight", old)


def new_data_of_a_part(model):
    part = model.transformer_blocks[1].attn.to_q.weight.qweight
    old, part.data = part.data, part.data.clone()
    return lambda: setattr(part, "data", old)


def new_data_of_a_table(model):
    table = model.pos_embed.pos_freqs
    old, table.data = table.data, table.data.clone()
    return lambda: setattr(table, "data", old)


def new_table(model):
    old, model.pos_embed.pos_freqs = model.pos_embed.pos_freqs, model.pos_embed.pos_freqs.clone()
    return lambda: setattr(model.pos_embed, "pos_freqs", old)


def new_module(model):
    old, model.norm_out = model.norm_out, copy.deepcopy(model.norm_out)
    return lambda: setattr(model, "norm_out", old)


def fewer_blocks(model):
    block = model.transformer_blocks[2]
    del model.transformer_blocks[2]
    return lambda: model.transformer_blocks.append(block)


def new_forward(model):
    model.proj_out.forward = lambda x: x
    return lambda: delattr(model.proj_out, "forward")


def compiled_block(model):
    model.transformer_blocks[1].compile(backend="eager")
    return lambda: model.transformer_blocks[1].__dict__.pop("_compiled_call_impl")


def new_processor(model):
    attention = model.transformer_blocks[0].attn
    old = attention.processor
    attention.set_processor(type(old)())
    return lambda: attention.set_processor(old)


def attention_backend(model):
    model.set_attention_backend("native")


def training(model):
    model.train()
    return model.eval


def dtype(model):
    model.to(torch.float16)


@pytest.mark.parametrize(
    "change",
    [
        set_compute,
        new_weight,
        new_data,
        data_laid_out_anew,
        new_part,
        new_data_of_a_part,
        new_table,
        new_data_of_a_table,
        new_module,
        fewer_blocks,
        new_forward,
        compiled_block,
        new_processor,
        attention_backend,
        training,
        dtype,
    ],
)
def test_what_of_a_model_counts(model, change):
    assert changes(model, change)


def test_values_and_a_cache_context_do_not_count(model):
    state = ModelState(model)
    before = state.key()
    model.proj_out.weight.data.add_(1)
    with model.cache_context("cond"):
        assert state.key() == before
    model(**example_inputs(model))
    assert state.key() == before


def test_weights_that_are_gone_are_not_mistaken_for_others(model):
    """Objects made and dropped between two looks may reuse ids; the fingerprint still tells them apart."""
    state = ModelState(model)
    keys = {state.key()}
    for mode in ("bf16", "fp8", "bf16"):
        svdq_compile.set_compute(model, mode)
        svdq_compile.set_compute(model, "modelopt")
        svdq_compile.set_compute(model, mode)
        gc.collect()
        keys.add(state.key())
    assert len(keys) == 3


def test_replaced_weights_are_let_go_at_the_next_look(model):
    state = ModelState(model)
    state.key()
    old = weakref.ref(model.proj_out.weight)
    new_weight(model)
    state.key()
    gc.collect()
    assert old() is None


def test_settings_that_choose_kernels_count():
    seen = {environment(CPU)}
    with torch.inference_mode():
        seen.add(environment(CPU))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        seen.add(environment(CPU))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        seen.add(environment(CPU))
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_math"):
        seen.add(environment(CPU))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("fp32_precision", ["ieee", "tf32"]),
        ("allow_fp16_accumulation", [False, True]),
        ("allow_fp16_reduced_precision_reduction", [(False, False), (False, True), (True, True)]),
        ("allow_bf16_reduced_precision_reduction", [(False, False), (False, True), (True, True)]),
    ],
)
def test_settings_of_matrix_products_count(setting, values):
    """The second value of a pair allows split K."""
    matmul = torch.backends.cuda.matmul
    old, seen = getattr(matmul, setting), set()
    try:
        for value in values:
            setattr(matmul, setting, value)
            seen.add(environment(CPU))
    finally:
        setattr(matmul, setting, old)
    assert len(seen) == len(values)


def test_the_order_of_sdpa_backends_counts():
    """The same backends, the other way around."""
    backends = [torch.nn.attention.SDPBackend.FLASH_ATTENTION, torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    with torch.nn.attention.sdpa_kernel(backends, set_priority=True):
        before = environment(CPU)
    with torch.nn.attention.sdpa_kernel(backends[::-1], set_priority=True):
        assert environment(CPU) != before
