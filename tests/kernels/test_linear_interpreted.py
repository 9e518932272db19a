"""``svdq::linear`` by its kernels in Triton's interpreter, which computes float16 as a GPU would."""

import pathlib

import pytest
import torch

from svdq_compile.ops import reference
from svdq_compile.ops.linear import linear_reference
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.oracle import assert_within_budget
from svdq_compile.testing.tensors import run_script
from svdq_compile.testing.weights import random_linear

pytest.importorskip("triton")

APPLY = pathlib.Path(__file__).with_name("apply_kernels.py")

# Format, mode, leading dimensions of x, N, K, rank, and whether the layer has smoothing, a dynamic scale and a bias.
# No mode that rounds to e4m3, which the interpreter does in its own way.
CASES = [
    (Format.NVFP4_SVD, "bf16", (1,), 66, 272, 5, True, False, True),
    (Format.NVFP4_SVD, "nvfp4", (2, 5), 40, 1040, 32, True, True, True),
    (Format.NVFP4, "bf16", (16,), 130, 512, 0, False, False, False),
    (Format.NVFP4_SVD, "nvfp4", (2, 10), 48, 272, 5, True, False, True),
    (Format.NVFP4_SVD, "nvfp4", (67,), 66, 48, 16, False, True, False),
    (Format.NVFP4_SVD, "bf16", (17,), 130, 144, 32, True, False, True),
    (Format.NVFP4, "nvfp4", (129,), 16, 32, 0, False, True, True),
    (Format.NVFP4, "bf16", (3, 7), 16, 80, 0, False, False, False),
    (Format.FP8, "bf16", (17,), 48, 48, 0, False, False, True),
    (Format.FP8_SVD, "bf16", (17,), 48, 80, 16, True, False, True),
]


def arguments(format, mode, leading, n, k, rank, smooth, dynamic, bias):
    """Arguments of the operator."""
    g = torch.Generator().manual_seed(n + k)
    options = {"rank": rank, "dtype": torch.float16, "smooth": smooth, "dynamic": dynamic, "bias": bias}
    layer = random_linear(n, k, format=format, compute=mode, generator=g, **options)
    x = torch.randn(*leading, k, generator=g).half()
    return (x, *(getattr(layer.weight, name) for name in COMPONENTS), layer.bias, mode)


@pytest.mark.parametrize("tokens", [5, 20])
def test_biases_that_lie_apart(tokens, tmp_path):
    """Every other one of a longer bias, and one value for all."""
    x, *parts, bias, mode = arguments(Format.NVFP4_SVD, "bf16", (tokens,), 48, 80, 16, True, False, True)
    biases = [bias.detach().repeat_interleave(2)[::2], bias.detach()[:1].expand(48)]
    cases = [(x, *(a.detach() for a in parts), each, mode) for each in biases]
    results = run_script(APPLY, [("linear_cuda", args) for args in cases], tmp_path, "cpu", "8")
    for args, actual in zip(cases, results, strict=True):
        assert not args[-2].is_contiguous()
        together = linear_reference(*args[:-2], args[-2].contiguous(), mode)
        oracle = linear_reference(reference.smooth(x, parts[4]).double(), *args[1:5], None, *args[6:])
        assert_within_budget(actual, oracle, low_precision=together)


# With tensor descriptors, and without.
@pytest.mark.parametrize("major", [8, 9])
def test_within_the_budget(major, tmp_path):
    cases = [arguments(*case) for case in CASES if major == 9 or "fp8" not in case[0].value]
    plain = [tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args) for args in cases]
    results = run_script(APPLY, [("linear_cuda", args) for args in plain], tmp_path, "cpu", str(major))
    scale = 1 + COMPONENTS.index("pre_quant_scale")
    for args, actual in zip(plain, results):
        assert actual.dtype == torch.float16
        assert actual.is_contiguous()
        # Smoothing rounds to x's dtype, so it comes before sums are widened.
        x_hat = reference.smooth(args[0], args[scale])
        oracle = linear_reference(x_hat.double(), *args[1:scale], None, *args[scale + 1 :])
        assert_within_budget(actual, oracle, low_precision=linear_reference(*args))
