"""A random model made in place is a loaded one: the same tensors, in the same places."""

import pytest
import torch

from svdq_compile.model.load import load_transformer
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.testing.checkpoints import QWEN_IMAGE, example_inputs, write_checkpoint
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.plans import RECIPES, plan_checkpoint
from svdq_compile.testing.random_model import random_transformer


def tensors(model):
    for name, parameter in model.named_parameters():
        parts = parameter.parts() if isinstance(parameter, SVDQWeight) else {"": parameter}
        for part, value in parts.items():
            yield f"{name}.{part}", value


@pytest.mark.parametrize("recipe", RECIPES)
def test_equals_a_written_and_loaded_checkpoint(recipe, tmp_path):
    loaded = load_transformer(write_checkpoint(tmp_path, recipe=recipe, seed=3))
    made = random_transformer(recipe=recipe, rank=8, seed=3)
    expected, actual = dict(tensors(loaded)), dict(tensors(made))
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert_bits_equal(actual[name], value)
    inputs = example_inputs(made)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)[0], made(**inputs)[0])


def test_expanded_runs():
    model = random_transformer(storage="expanded")
    with torch.no_grad():
        assert model(**example_inputs(model))[0].isfinite().all()


def test_the_released_size():
    plan = plan_checkpoint(QWEN_IMAGE, recipe="all", rank=32, blocks_kept=0, dtype="BF16")
    assert sum(1 for tensor in plan if tensor.role == "qweight") == 60 * 14
    assert 11e9 < sum(tensor.nbytes for tensor in plan) < 13e9
