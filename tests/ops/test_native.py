"""Whether a GPU's block-scaled kernel is used: only if it runs and gives the specification's sums."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from svdq_kernels import blockscaled

from svdq_compile.ops import codec, native

CPU = torch.device("cpu")


def right(x, x_scale, w, w_scale, *_):
    return codec.decode_nvfp4(codec.unpack_codes(x), x_scale) @ codec.decode_nvfp4(codec.unpack_codes(w), w_scale).t()


def nearly_right(*operands):
    y = right(*operands)
    y[-1, -1] += 1
    return y


def raising(*_):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("kernel", "warning"), [(right, None), (nearly_right, "is wrong here"), (raising, "does not run here")]
)
def test_a_kernel_is_checked(monkeypatch, caplog, kernel, warning):
    monkeypatch.setattr(blockscaled, "multiply_nvfp4", kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with caplog.at_level(logging.WARNING):
        assert native._is_right.__wrapped__(CPU) == (warning is None)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ([] if warning is None else [f"a card: the block-scaled kernel {warning} and is not used"])


def test_the_default_device_does_not_matter(monkeypatch):
    monkeypatch.setattr(blockscaled, "multiply_nvfp4", right)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    with torch.device("meta"):
        assert native._is_right.__wrapped__(CPU)
