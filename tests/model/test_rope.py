"""RoPE tables follow the model, keep their values, and are never copied on a forward."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import svdq_compile
from svdq_compile.model.rope import TABLES, kept_outputs, move_tables, rope_modules
from svdq_compile.testing.checkpoints import SMALL, example_inputs, write_checkpoint
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer

variants = pytest.mark.parametrize("layered", [False, True], ids=["2d", "layer3d"])


def rope_model(layered):
    return random_transformer(SMALL | {"use_layer3d_rope": layered})


def devices(model):
    (module,) = rope_modules(model)
    return {str(getattr(module, name).device) for name in TABLES}


@variants
def test_tables_follow_the_model(layered):
    """On fake tensors, so that there is a GPU to go to; ``meta`` would lose the values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = torch.nn.ModuleList([rope_model(layered).pos_embed])
        move_tables(model, "cuda:0")
        assert devices(model) == {"cuda:0"}
        model.to("cpu")
        assert devices(model) == {"cpu"}
        model.to("meta")
        assert devices(model) == {"cpu"}


@variants
def test_values_survive_dtypes_and_copies(layered):
    model = rope_model(layered)
    (module,) = rope_modules(model)
    before = {name: getattr(module, name).clone() for name in TABLES}
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    move_tables(model, "cpu")
    move_tables(model, "cpu")
    for other in (model.to(torch.float16).to(torch.bfloat16), copy.deepcopy(model)):
        (module,) = rope_modules(other)
        for name, value in before.items():
            assert_bits_equal(torch.view_as_real(getattr(module, name)), torch.view_as_real(value))
        assert_bits_equal(other(**inputs)[0], expected)
    (again,) = rope_modules(torch.nn.ModuleList([pickle.loads(pickle.dumps(module))]))
    for other in (again, copy.deepcopy(module)):
        assert other._apply.args == (other,)
        assert other is not module


def test_loading_arranges_it(tmp_path):
    model = svdq_compile.load_transformer(write_checkpoint(tmp_path))
    (module,) = rope_modules(model)
    assert "_apply" in module.__dict__


@variants
def test_kept_outputs_are_computed_once(layered):
    model = rope_model(layered)
    inputs = example_inputs(model)
    expected = model(**inputs)[0]
    with kept_outputs(model) as kept:
        for _ in range(3):
            assert_bits_equal(model(**inputs)[0], expected)
        assert len(kept) == 2
        model(**example_inputs(model, height=2))
        assert len(kept) == 4
    assert "forward" not in model.pos_embed.__dict__
    assert_bits_equal(model(**inputs)[0], expected)


def test_a_model_without_tables_is_left_alone():
    move_tables(torch.nn.Linear(2, 2), "cpu")
    with kept_outputs(None) as kept:
        assert kept == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@variants
def test_on_a_gpu(layered):
    """A model that was moved there computes with tables there: nothing waits for a copy."""
    model = rope_model(layered)
    move_tables(model, "cpu")
    model.to("cuda")
    assert devices(model) == {"cuda:0"}
    inputs = example_inputs(model, device="cuda")
    model(**inputs)
    (module,) = rope_modules(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Past the LRU cache, as code compiled as a whole goes.
        type(module)._get_device_freqs.__wrapped__(module, torch.device("cuda", 0))
        model(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
