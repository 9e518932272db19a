"""Quantised weights enter a compiled graph by component; Dynamo's graph and what a call is given stay as they are."""

import pytest
import torch

from svdq_compile.ops.linear import linear
from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.passes.base import value_of
from svdq_compile.passes.insert_linear import insert_linear
from svdq_compile.passes.split_weights import split_weights, splitting
from svdq_compile.spec import Format
from svdq_compile.testing.graphs import captured
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def backend():
    """Inserts ``svdq::linear`` and runs the split graph; ``.seen`` has gm, the split graph and its example inputs."""

    def compile(gm, example_inputs):
        insert_linear(gm)
        split, inputs, readers = split_weights(gm, example_inputs)
        compile.seen.append((gm, split, inputs, example_inputs))
        return splitting(split.forward, readers)

    compile.seen = []
    return compile


def placeholders(gm):
    return gm.graph.find_nodes(op="placeholder")


def layers(generator):
    return torch.nn.Sequential(
        random_linear(32, 48, generator=generator),
        torch.nn.Linear(32, 64, dtype=torch.bfloat16),
        random_linear(16, 64, format=Format.FP8, bias=False, generator=generator),
    )


def test_inputs_are_components_in_the_weights_places(backend):
    model = layers(torch.Generator().manual_seed(0)).requires_grad_(False)
    x = torch.randn(5, 48).bfloat16()
    assert_bits_equal(torch.compile(model, backend=backend, fullgraph=True)(x), model(x))
    [(gm, split, inputs, example_inputs)] = backend.seen
    assert sum(isinstance(value_of(node), SVDQWeight) for node in placeholders(gm)) == 2
    assert not any(isinstance(value, SVDQWeight) for value in inputs)
    assert len(inputs) == len(placeholders(split)) == len(example_inputs) - 2 + 7 + 3
    for node, value in zip(placeholders(split), inputs, strict=True):
        assert (value_of(node).shape, value_of(node).dtype) == (value.shape, value.dtype)
    (first, second) = split.graph.find_nodes(op="call_function", target=linear)
    assert [a if a is None else a.op for a in first.args[1:8]] == ["placeholder"] * 7
    assert [a if a is None else a.op for a in second.args[1:9]].count("placeholder") == 3
    assert not split.graph.find_nodes(op="call_function", target=getattr)


def test_components_are_parameters_with_sources_of_their_own(backend):
    """What AOTAutograd and CUDA graphs ask of an input: where it comes from, and that it lies still."""
    model = layers(torch.Generator().manual_seed(0)).requires_grad_(False)
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(5, 48).bfloat16())
    [(gm, split, _, _)] = backend.seen
    sources = [node._dynamo_source for node in placeholders(split)]
    assert None not in sources
    assert len(set(sources)) == len(sources)

    def still(gm):
        return [bool(n.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")) for n in placeholders(gm)]

    assert still(split).count(False) == still(gm).count(False) == 1
    assert split.meta is gm.meta
    assert split._param_name_to_source is gm._param_name_to_source


def test_other_weights_of_the_same_kind_are_read_at_the_call(backend):
    """Blocks share compiled code: what is read must be the call's, not the example's."""
    generator = torch.Generator().manual_seed(0)
    models = [layers(generator).requires_grad_(False) for _ in range(2)]
    x = torch.randn(5, 48).bfloat16()
    torch.compile(models[0], backend=backend, fullgraph=True)(x)
    models[0].load_state_dict(models[1].state_dict(), assign=True)
    compiled = torch.compile(models[0], backend=backend, fullgraph=True)
    assert_bits_equal(compiled(x), models[1](x))
    assert len(backend.seen) == 1


def test_a_weight_that_is_also_returned_stays_whole():
    layer, x = random_linear(32, 48), torch.randn(5, 48).bfloat16()
    gm = captured(layer, x)
    insert_linear(gm)
    weight = next(node for node in placeholders(gm) if isinstance(value_of(node), SVDQWeight))
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((*output.args[0], weight),)
    gm.recompile()
    given = {"weight": layer.weight, "bias": layer.bias}
    inputs = [next((value for part, value in given.items() if part in n.name), x) for n in placeholders(gm)]
    split, flat, readers = split_weights(gm, inputs)
    assert all(a is b for a, b in zip(flat, inputs, strict=True))
    y, returned = splitting(split.forward, readers)(*inputs)
    assert_bits_equal(y, layer(x))
    assert returned is layer.weight


def test_graphs_without_quantised_weights_are_called_as_they_are():
    def compiled():
        return None

    assert splitting(compiled, (None, None)) is compiled
