"""Expanded weights compute in fp8 mode what the packed ones do, and refuse what they have given up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from svdq_compile.errors import DenseWeightError, StorageError
from svdq_compile.ops.linear import linear
from svdq_compile.ops.modes import FP8_MIN_TOKENS, NEEDS_CODES
from svdq_compile.ops.storage import expand, stored_spec
from svdq_compile.ops.weight import take
from svdq_compile.spec import STORAGES, Format
from svdq_compile.testing.graphs import RecordingBackend
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

PACKED = [Format.NVFP4_SVD, Format.NVFP4]

seeds = st.integers(0, 2**32)
features = st.sampled_from([16, 32, 80])


def expanded(layer):
    """The layer with its weight expanded, and the same bias."""
    other = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    other.weight, other.bias = nn.Parameter(expand(layer.weight), requires_grad=False), layer.bias
    return other


def make(seed, n, k, m=FP8_MIN_TOKENS, compute="fp8", **kwargs):
    g = torch.Generator().manual_seed(seed)
    layer = random_linear(n, k, generator=g, compute=compute, **kwargs)
    return layer, torch.randn(m, k, generator=g).to(layer.weight.dtype)


@given(
    seeds,
    features,
    features,
    st.sampled_from(PACKED),
    st.sampled_from([0, 1, 16]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.booleans(),
)
def test_fp8_mode_is_bitwise_that_of_the_packed_weight(seed, n, k, format, rank, dtype, smooth, dynamic):
    layer, x = make(seed, n, k, format=format, rank=rank, dtype=dtype, smooth=smooth, dynamic=dynamic)
    other = expanded(layer)
    assert_bits_equal(other(x), layer(x))
    assert_bits_equal(other(x.double()), layer(x.double()))


@pytest.mark.parametrize("format", PACKED, ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_components(format, dynamic):
    layer, _ = make(0, 32, 48, format=format, dynamic=dynamic)
    packed, other = layer.weight, expand(layer.weight)
    assert (other.spec.format, other.spec.rank, other.spec.smooth) == (
        Format.FP8_SVD,
        packed.spec.rank,
        packed.spec.smooth,
    )
    assert other.fingerprint.compute == "fp8"
    assert other.parts().keys() == packed.parts().keys() - {"weight_scale_2"}
    assert (other.qweight.dtype, other.qweight.shape) == (torch.float8_e4m3fn, (32, 48))
    assert other.weight_scale == packed.weight_scale_2 * 8
    if not dynamic:
        assert other.input_scale == packed.input_scale * 6
    if format is Format.NVFP4_SVD:
        assert other.lora_down.data_ptr() == packed.lora_down.data_ptr()
    assert other.packed_nbytes() == sum(part.nbytes for part in other.parts().values())
    assert other.dtype == packed.dtype


def test_an_empty_low_rank_pair_is_dropped():
    layer, _ = make(0, 32, 48, rank=0)
    other = expand(layer.weight)
    assert "lora_down" in layer.weight.parts()
    assert "lora_down" not in other.parts()
    assert not other.spec.has_low_rank


def test_expanding_twice_is_expanding_once():
    layer, _ = make(0, 32, 48)
    other = expand(layer.weight)
    assert expand(other) is other
    fp8, _ = make(0, 32, 48, format=Format.FP8)
    assert expand(fp8.weight) is fp8.weight


@pytest.mark.parametrize("compute", NEEDS_CODES)
def test_codes_that_are_needed_are_not_given_up(compute):
    layer, _ = make(0, 32, 48, compute=compute)
    with pytest.raises(StorageError, match=f"compute='{compute}' needs the 4-bit codes"):
        expand(layer.weight)
    other = expand(layer.weight.with_compute("auto"))
    with pytest.raises(StorageError, match="load the checkpoint with storage='packed'"):
        other.with_compute(compute)


def test_an_unknown_storage_is_refused():
    layer, _ = make(0, 32, 48)
    with pytest.raises(StorageError, match=r"storage='dense'\n.*choose one of packed, expanded"):
        stored_spec(layer.weight.spec, "dense")
    assert {stored_spec(layer.weight.spec, storage).storage for storage in STORAGES} == set(STORAGES)


@given(seeds, st.sampled_from(PACKED), st.booleans())
def test_slices_of_an_expanded_weight_are_expanded_slices(seed, format, dynamic):
    layer, _ = make(seed, 33, 80, format=format, dynamic=dynamic)
    whole = expand(layer.weight)
    for dim, start, end, step in ((0, 3, 20, 1), (0, 0, 33, 2), (1, 16, 64, 1)):
        cut, expected = take(whole, dim, start, end, step), expand(take(layer.weight, dim, start, end, step))
        assert cut.fingerprint == expected.fingerprint
        for name, part in expected.parts().items():
            assert_bits_equal(cut.parts()[name], part)


def test_columns_of_an_expanded_weight_are_cut_anywhere():
    layer, x = make(0, 32, 48, bias=False)
    whole = expand(layer.weight)
    parts = [nn.functional.linear(x[:, a:b].double(), take(whole, 1, a, b)) for a, b in ((0, 5), (5, 48))]
    torch.testing.assert_close(sum(parts), nn.functional.linear(x.double(), whole), rtol=1e-9, atol=1e-9)
    with pytest.raises(DenseWeightError, match="multiples of 1"):
        take(whole, 1, 0, 48, 2)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["svdq", "inductor"])
def test_compiled(backend):
    layer, x = make(0, 32, 48, compute="auto")
    other = expanded(layer)
    assert_bits_equal(torch.compile(other, backend=backend, fullgraph=True)(x), other(x))


@pytest.mark.usefixtures("fresh_dynamo")
def test_graphs_say_what_auto_means_for_an_expanded_weight():
    """The operator could take it for an FP8 checkpoint's."""
    layer, x = make(0, 32, 48, compute="auto")
    recorder = RecordingBackend(lower=False)
    for module in (layer, expanded(layer)):
        torch.compile(module, backend=recorder, fullgraph=True)(x)
    nodes = [graph.graph.find_nodes(op="call_function", target=linear)[0] for graph in recorder.graphs]
    assert [node.args[9] for node in nodes] == ["auto", "fp8"]
