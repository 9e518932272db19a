"""The weight behaves like a parameter wherever a parameter is moved, copied or saved, and like nothing else."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.errors import DenseWeightError, FingerprintError, OptionError
from svdq_compile.ops.weight import SVDQWeight, take
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]


@pytest.fixture(params=FORMATS, ids=str)
def layer(request):
    return random_linear(32, 48, format=request.param, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).bfloat16()


def assert_same_weight(a: SVDQWeight, b: SVDQWeight) -> None:
    assert a.fingerprint == b.fingerprint
    assert a.parts().keys() == b.parts().keys()
    for name, part in a.parts().items():
        assert_bits_equal(part, b.parts()[name])


def test_it_looks_like_the_dense_weight(layer):
    assert type(layer) is nn.Linear
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.shape == (32, 48)
    assert layer.weight.dtype == torch.bfloat16
    assert "32" in repr(layer.weight)
    assert layer.weight.packed_nbytes() == sum(p.nbytes for p in layer.weight.parts().values())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_dynamo_compares_is_one_object_for_weights_alike(format):
    """At every call of a compiled block, for each of its weights, with a deep copy of what it saw first."""
    one, other = (random_linear(32, 48, format=format).weight for _ in range(2))
    names, (fingerprint, dtype) = other.__tensor_flatten__()
    seen = copy.deepcopy(one.__tensor_flatten__()[1])
    assert names == list(other.parts())
    assert seen[0] is fingerprint
    assert seen[1] is dtype
    changed = other.with_compute("modelopt") if format is not Format.FP8_SVD else other.to(torch.float16)
    assert changed.__tensor_flatten__()[1] != seen


NEEDS_DENSE_VALUES = {
    "add": lambda w: w + 1,
    "transpose": lambda w: w.t(),
    "matmul": lambda w: w @ w,
    "sum": lambda w: w.float().sum(),
    "in_place": lambda w: w.mul_(2),
    "index": lambda w: w[0],
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "cat": lambda w: torch.cat((w, w)),
    "equal": lambda w: torch.equal(w, w),
    "reshape": lambda w: w.reshape(-1),
    "as_bias": lambda w: F.linear(torch.zeros(48), torch.zeros(32, 48), w),
    "as_input": lambda w: F.linear(w, torch.zeros(8, 48)),
    "copy_from_dense": lambda w: w.copy_(torch.zeros(32, 48)),
    "copy_to_dense": lambda w: torch.zeros(32, 48).copy_(w),
}


@pytest.mark.parametrize("operation", NEEDS_DENSE_VALUES.values(), ids=NEEDS_DENSE_VALUES.keys())
def test_whatever_needs_dense_values_raises(layer, operation):
    with pytest.raises((DenseWeightError, RuntimeError, TypeError)) as caught:
        operation(layer.weight)
    assert (
        isinstance(caught.value, DenseWeightError) or "SVDQWeight" in str(caught.value) or "numpy" in str(caught.value)
    )


def test_deepcopy_owns_its_tensors(layer, x):
    twin = copy.deepcopy(layer)
    expected = layer(x)
    layer.weight.qweight.zero_()
    assert_bits_equal(twin(x), expected)


def test_to_dtype_leaves_packed_data_alone(layer, x):
    before = {name: part.clone() for name, part in layer.weight.parts().items()}
    layer.to(torch.float16)
    assert layer.weight.dtype == torch.float16
    assert layer(x.half()).dtype == torch.float16
    for name, part in layer.weight.parts().items():
        assert_bits_equal(part, before[name])


def test_to_device_moves_every_component(layer):
    moved = layer.to("meta")
    assert moved.weight.device.type == "meta"
    assert {part.device.type for part in moved.weight.parts().values()} == {"meta"}


def test_state_dict_round_trips(layer, x):
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert_same_weight(state["weight"], layer.weight)
    for assign in (False, True):
        other = random_linear(32, 48, format=layer.weight.spec.format)
        other.load_state_dict(state, assign=assign)
        assert_bits_equal(other(x), expected)


def test_loading_another_layout_is_refused(layer):
    other = random_linear(32, 64, format=layer.weight.spec.format)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(layer.state_dict())
    if layer.weight.spec.rank:
        other = random_linear(32, 48, rank=3)
        with pytest.raises((FingerprintError, RuntimeError), match="rank"):
            other.load_state_dict(layer.state_dict())


def test_slices_have_the_shapes_their_specs_say(layer):
    w = layer.weight
    assert w[8:20].shape == (12, 48)
    assert w[-4:].shape == (4, 48)
    assert w[:, 16:48].shape == (32, 32)
    assert [c.shape[0] for c in w.chunk(3)] == [11, 11, 10]
    assert [c.shape[1] for c in w.split([16, 32], 1)] == [16, 32]
    assert w.narrow(0, 3, 5).shape == (5, 48)
    for part in (w[8:20], w[:, 16:48]):
        assert isinstance(part, SVDQWeight)


def test_a_slice_is_a_view(layer):
    assert layer.weight[4:8].qweight.data_ptr() == layer.weight.qweight[4:].data_ptr()


@pytest.mark.parametrize(("start", "end"), [(8, 48), (0, 40), (1, 17)])
def test_columns_are_cut_at_block_boundaries(start, end):
    layer = random_linear(32, 48)
    with pytest.raises(DenseWeightError, match="multiples of 16"):
        take(layer.weight, 1, start, end)


def test_a_component_of_the_wrong_shape_is_refused(layer):
    parts = layer.weight.parts()
    parts["qweight"] = parts["qweight"][:-1]
    with pytest.raises(FingerprintError, match="qweight"):
        SVDQWeight(parts, layer.weight.fingerprint, torch.bfloat16)


def test_a_missing_component_is_refused(layer):
    parts = layer.weight.parts()
    del parts["input_scale"]
    with pytest.raises(FingerprintError, match="input_scale"):
        SVDQWeight(parts, layer.weight.fingerprint, torch.bfloat16)


def test_switching_the_compute_mode_shares_the_tensors(layer):
    other = layer.weight.with_compute("bf16")
    assert other.fingerprint.compute == "bf16"
    assert other.qweight.data_ptr() == layer.weight.qweight.data_ptr()
    with pytest.raises(OptionError, match="choose one of"):
        layer.weight.with_compute("fastest")


def test_assigning_data_moves_the_components_too(layer, x):
    """Group offloading does ``parameter.data = elsewhere`` and back (between devices: tests/gpu)."""
    other = random_linear(32, 48, format=layer.weight.spec.format, generator=torch.Generator().manual_seed(9))
    other.bias = layer.bias
    expected, parameter, home = layer(x), layer.weight, layer.weight.data.clone()
    layer.weight.data = other.weight.data
    assert layer.weight is parameter
    assert_bits_equal(layer(x), other(x))
    layer.weight.data = home
    assert_bits_equal(layer(x), expected)
    with pytest.raises(DenseWeightError):
        layer.weight.data = torch.zeros(32, 48, dtype=torch.bfloat16)


def test_sequential_offloading_moves_weights_in_and_out():
    """accelerate's hooks rebuild each parameter from the offloaded copy around every forward."""
    from accelerate import cpu_offload

    layers = [random_linear(48, 48, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    model = nn.Sequential(*layers)
    x = torch.randn(5, 48).bfloat16()
    expected = model(x)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded[0].weight.device.type == "meta"
    for _ in range(2):
        assert_bits_equal(offloaded(x), expected)
    assert offloaded[0].weight.device.type == "meta"


def test_weights_have_pointers_of_their_own():
    a, b = random_linear(32, 48).weight, random_linear(32, 48).weight
    assert len({a.data_ptr(), b.data_ptr(), 0}) == 3
