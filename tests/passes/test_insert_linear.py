"""The graph rewrite, on graphs small enough to read."""

import pytest
import torch
import torch.nn.functional as F

from svdq_compile._compat import FUNCTIONAL_LINEAR
from svdq_compile.errors import FingerprintError
from svdq_compile.ops.linear import linear
from svdq_compile.passes.insert_linear import insert_linear
from svdq_compile.spec import Format
from svdq_compile.testing.graphs import captured
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def calls(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def x_of(k, *lead):
    return torch.randn(*lead, k, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_the_rewritten_graph():
    """One linear: its components are read from the weight, in the operator's order, and nothing else changes."""
    layer = random_linear(32, 48, rank=16)
    gm = captured(layer, x_of(48, 5))
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    report = insert_linear(gm)
    assert [node.name for node in gm.graph.nodes if node.op == "placeholder"] == placeholders
    assert calls(gm) == [getattr] * 7 + [linear]
    (node,) = gm.graph.find_nodes(op="call_function", target=linear)
    read = [a.args[1] for a in node.args[1:8]]
    assert read == [
        "qweight",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        "pre_quant_scale",
        "lora_down",
        "lora_up",
    ]
    assert node.args[9] == "auto"
    assert [match.fingerprint.spec for match in report.matched] == [layer.weight.spec]
    assert report.left == ()


def test_the_rewritten_graph_computes_the_same():
    layers = torch.nn.Sequential(
        random_linear(32, 48), random_linear(64, 32, format=Format.NVFP4), random_linear(16, 64, format=Format.FP8)
    )
    x = x_of(48, 2, 5)
    results = []

    def rewrite(gm, example_inputs):
        results.append(insert_linear(gm))
        return gm.forward

    assert_bits_equal(torch.compile(layers, backend=rewrite, fullgraph=True)(x), layers(x))
    assert len(results[0].matched) == 3


def test_absent_components_are_none():
    layer = random_linear(32, 48, format=Format.NVFP4, dynamic=True, bias=False, compute="modelopt")
    gm = captured(layer, x_of(48, 5))
    insert_linear(gm)
    (node,) = gm.graph.find_nodes(op="call_function", target=linear)
    assert [a is None for a in node.args[1:9]] == [False, False, False, True, True, True, True, True]
    assert node.args[9] == "modelopt"


def test_dense_linears_are_left_and_reported():
    model = torch.nn.Sequential(torch.nn.Linear(48, 48, dtype=torch.bfloat16), random_linear(32, 48))
    gm = captured(model, x_of(48, 5))
    report = insert_linear(gm)
    assert (len(report.matched), len(report.left)) == (1, 1)
    assert len(gm.graph.find_nodes(op="call_function", target=FUNCTIONAL_LINEAR)) == 1
    assert "not quantised" in report.summary()


def test_a_graph_without_quantised_weights_is_untouched():
    gm = captured(torch.nn.Linear(48, 32), torch.randn(5, 48))
    before = gm.code
    assert insert_linear(gm).matched == ()
    assert gm.code == before


def test_the_pass_is_idempotent():
    gm = captured(random_linear(32, 48), x_of(48, 5))
    insert_linear(gm)
    once = gm.code
    assert insert_linear(gm).matched == ()
    assert gm.code == once


def test_a_weight_used_twice_is_read_once():
    layer = random_linear(48, 48)

    def twice(x):
        return layer(layer(x))

    gm = captured(twice, x_of(48, 5))
    report = insert_linear(gm)
    assert len(report.matched) == 2
    assert calls(gm).count(getattr) == 7


def test_keyword_arguments_and_a_missing_bias():
    layer = random_linear(32, 48, bias=False)

    def by_name(x):
        return F.linear(input=x, weight=layer.weight)

    x = x_of(48, 5)
    gm = captured(by_name, x)
    assert len(insert_linear(gm).matched) == 1


def test_a_slice_of_a_weight_is_a_weight():
    """What tensor parallelism will do: rows of a parameter, used as a layer."""
    layer = random_linear(32, 48)

    def rows(x):
        return F.linear(x, layer.weight[8:24], layer.bias[8:24])

    x = x_of(48, 5)
    assert_bits_equal(torch.compile(rows, backend="svdq", fullgraph=True)(x), layer(x)[:, 8:24])


def test_components_that_do_not_fit_are_refused():
    gm = captured(random_linear(32, 48), x_of(48, 5))
    (weight,) = (n for n in gm.graph.nodes if hasattr(n.meta.get("example_value"), "fingerprint"))
    value = weight.meta["example_value"]
    value.weight_scale = value.weight_scale[:, :2]
    with pytest.raises(FingerprintError, match="weight_scale"):
        insert_linear(gm)


def test_a_quantised_weight_outside_a_linear_is_refused():
    gm = captured(random_linear(32, 48), x_of(48, 5))
    (weight,) = (n for n in gm.graph.nodes if hasattr(n.meta.get("example_value"), "fingerprint"))
    with gm.graph.inserting_after(weight):
        gm.graph.call_function(torch.mul, (weight, 2))
    with pytest.raises(FingerprintError, match="not by a linear"):
        insert_linear(gm)
