"""What ``auto`` means on a device, and what a mode computes with."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.errors import StorageError
from svdq_compile.lowering.select import select
from svdq_compile.ops.linear import linear
from svdq_compile.ops.modes import COMPUTE_MODES, FP8_MIN_TOKENS, NEEDS_CODES, arithmetic, resolve
from svdq_compile.ops.weight import Fingerprint
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear

STORED = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8]
BY_CAPABILITY = {
    (7, 5): "nvfp4",
    (8, 0): "bf16",
    (8, 6): "bf16",
    (8, 7): "bf16",
    (8, 9): "fp8",
    (9, 0): "fp8",
    (10, 0): "nvfp4",
    (10, 3): "nvfp4",
    (12, 0): "nvfp4",
}


@pytest.fixture
def capability(monkeypatch):
    def pretend(found):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)

    return pretend


@pytest.mark.parametrize("format", STORED, ids=str)
@pytest.mark.parametrize(("found", "mode"), BY_CAPABILITY.items())
def test_auto_by_capability(capability, format, found, mode):
    capability(found)
    assert resolve("auto", format, torch.device("cuda")) == mode


@pytest.mark.parametrize("found", BY_CAPABILITY)
def test_auto_of_an_expanded_weight(capability, found):
    capability(found)
    assert resolve("auto", Format.FP8_SVD, torch.device("cuda", 0)) == ("fp8" if found >= (8, 9) else "bf16")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_where_there_is_no_gpu(device):
    assert {resolve("auto", format, torch.device(device)) for format in STORED} == {"nvfp4"}
    assert resolve("auto", Format.FP8_SVD, torch.device(device)) == "fp8"


def test_auto_on_rocm(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert resolve("auto", Format.NVFP4, torch.device("cuda")) == "nvfp4"


@pytest.mark.parametrize("mode", COMPUTE_MODES[1:])
def test_any_other_mode_is_what_it_says(mode):
    assert resolve(mode, Format.NVFP4, torch.device("cuda")) == mode


def test_few_tokens_are_not_quantised():
    assert arithmetic("fp8", FP8_MIN_TOKENS - 1) == "bf16"
    assert arithmetic("fp8", FP8_MIN_TOKENS) == "fp8"
    for mode in ("nvfp4", "bf16", "modelopt"):
        assert arithmetic(mode, 0) == mode
    assert arithmetic("fp8", 1, packed=False) == "fp8"


@pytest.mark.parametrize("format", [*STORED, Format.FP8_SVD], ids=str)
@pytest.mark.parametrize("found", BY_CAPABILITY)
def test_select_asks_what_auto_means(capability, format, found):
    capability(found)
    device, weight = torch.device("cuda", 0), random_linear(32, 48, format=format).weight
    mode = resolve("auto", format, device)
    assert select(weight.fingerprint, device) == select(weight.with_compute(mode).fingerprint, device)


@pytest.mark.parametrize("mode", NEEDS_CODES)
def test_an_expanded_weight_has_no_mode_that_needs_codes(mode):
    spec = random_linear(32, 48, format=Format.FP8_SVD).weight.spec
    with pytest.raises(StorageError, match=f"compute='{mode}' needs the 4-bit codes.*\n.*storage='packed'"):
        Fingerprint(spec, mode)


@given(st.integers(0, 2**32), st.sampled_from([*STORED, Format.FP8_SVD]), st.sampled_from([1, 127, 128, 130]))
def test_auto_is_bitwise_what_it_resolves_to(seed, format, tokens):
    g = torch.Generator().manual_seed(seed)
    layer = random_linear(16, 32, format=format, generator=g)
    x = torch.randn(tokens, 32, generator=g).bfloat16()
    auto = layer(x)
    mode = resolve("auto", format, x.device)
    layer.weight = torch.nn.Parameter(layer.weight.with_compute(mode), requires_grad=False)
    assert_bits_equal(auto, layer(x))


@pytest.mark.parametrize("format", [Format.NVFP4_SVD, Format.NVFP4], ids=str)
def test_tokens_are_all_leading_dimensions(format):
    layer = random_linear(16, 32, format=format, compute="fp8")
    parts = [getattr(layer.weight, name) for name in COMPONENTS]
    x = torch.randn(2, (FP8_MIN_TOKENS + 1) // 2, 32).bfloat16()
    for rows, same in ((x, False), (x[:, 1:], True)):
        bf16, fp8 = (linear(rows, *parts, layer.bias, mode) for mode in ("bf16", "fp8"))
        assert torch.equal(bf16, fp8) == same
