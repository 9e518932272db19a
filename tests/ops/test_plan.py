"""The plan of a linear: one answer for eager calls, the lowering, strict and explain."""

import dataclasses

import pytest
import torch

from svdq_compile.ops.modes import FP8_MIN_TOKENS
from svdq_compile.ops.plan import GEMV_TOKENS, Facts, plan

FACTS = Facts(
    mode="fp8",
    capability=(9, 0),
    weight=torch.uint8,
    activation=torch.bfloat16,
    in_features=3072,
    tokens=4096,
    rank=32,
    low_rank=torch.bfloat16,
)


def changed(**facts):
    return plan(dataclasses.replace(FACTS, **facts))


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"mode": "modelopt"}, "ModelOpt's simulation"),
        ({"capability": None}, "NVIDIA GPU"),
        ({"capability": (7, 5)}, "sm_80"),
        ({"capability": (8, 6)}, "sm_89"),
        ({"activation": torch.float32}, "float32"),
        ({"low_rank": torch.float16}, "low-rank factors float16"),
        ({"rank": 512}, "rank 512"),
        ({"in_features": 3080}, "multiple of 16"),
        ({"scale_is_one_value": False}, "several values"),
    ],
)
def test_what_the_kernels_do_not_take(facts, reason):
    chosen = changed(**facts)
    assert not chosen.fused
    assert chosen.kernel == "reference"
    assert reason in chosen.reason


@pytest.mark.parametrize(
    ("facts", "kernel", "operand"),
    [
        ({}, "dense", "fp8"),
        ({"mode": "nvfp4"}, "dense", "nvfp4"),
        ({"mode": "bf16"}, "dense", "plain"),
        ({"mode": "bf16", "capability": (8, 0)}, "dense", "plain"),
        ({"mode": "nvfp4", "capability": (10, 0), "native": True}, "blockscaled", "nvfp4_packed"),
        ({"mode": "nvfp4", "capability": (10, 0)}, "dense", "nvfp4"),
        ({"tokens": GEMV_TOKENS}, "gemv", "plain"),
        ({"tokens": FP8_MIN_TOKENS}, "dense", "fp8"),
        ({"tokens": 1, "mode": "nvfp4"}, "gemv", "nvfp4"),
        ({"tokens": 1, "mode": "bf16", "capability": (8, 0)}, "dense", "plain"),
        ({"weight": torch.float8_e4m3fn, "tokens": 1}, "dense", "fp8"),
        ({"weight": torch.float8_e4m3fn, "mode": "bf16"}, "dense", "plain"),
        ({"rank": 0, "low_rank": None, "activation": torch.float16}, "dense", "fp8"),
    ],
)
def test_the_kernel_and_its_operand(facts, kernel, operand):
    chosen = changed(**facts)
    assert (chosen.kernel, chosen.operand) == (kernel, operand)
    assert chosen.fused


def test_few_tokens_of_fp8_are_those_of_the_matrix_vector_kernel():
    """Where the arithmetic changes the kernel does, so that one guard covers both."""
    assert FP8_MIN_TOKENS == GEMV_TOKENS + 1


def test_kernels_change_where_compiled_graphs_have_a_guard():
    pytest.importorskip("triton")
    from svdq_kernels import few, gemv

    assert few.MAX_TOKENS == gemv.MAX_TOKENS == GEMV_TOKENS
