"""Which kernels compute a linear, from what is known of its operands. Asked by eager calls, the lowering, ``strict``
and ``explain``, so that all four agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .modes import FP8_MIN_TOKENS, arithmetic

HALF_DTYPES = (torch.bfloat16, torch.float16)

MAX_RANK = 256
"""Largest R whose down-projection fits the registers of the activation kernel."""

GEMV_TOKENS = 16
"""Most tokens for the kernel of a few (``svdq_kernels.gemv.MAX_TOKENS``): with 32 it was slower than cuBLAS BF16."""

MANY = max(GEMV_TOKENS + 1, FP8_MIN_TOKENS)
"""Least tokens that no special rule is for."""

FEED_FORWARD_RANK = 64
"""Largest R of a linear whose operand the GEMM before it makes (``svdq_kernels.feed_forward.MAX_RANK``)."""

HEAD_DIMS = (64, 128)
"""Sizes of an attention head that one tile of a GEMM holds whole heads of (``svdq_kernels.heads.HEAD_DIMS``)."""

Capability = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one call of ``svdq::linear`` is computed.

    Args:
        kernel: ``gemv``, ``dense``, ``blockscaled``, or ``reference`` (the specification in PyTorch).
        operand: what the activation becomes, one of ``svdq_kernels.activation.OPERANDS`` or ``nvfp4_packed``.
        reason: why this kernel.
    """

    kernel: str
    operand: str
    reason: str

    @property
    def fused(self) -> bool:
        """Whether our kernels compute it."""
        return self.kernel != "reference"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a plan depends on.

    Args:
        mode: the resolved compute mode.
        capability: of the NVIDIA GPU, None for any other device.
        native: whether its block-scaled 4-bit tensor cores are used.
        weight: dtype of qweight, uint8 (NVFP4) or float8_e4m3fn.
        activation: dtype of x.
        in_features: K.
        tokens: M, or a value on the same side of :data:`GEMV_TOKENS` and ``FP8_MIN_TOKENS``.
        rank: R.
        low_rank: dtype of the low-rank factors; None without them.
        scale_is_one_value: whether ``input_scale`` is absent or has one element.
    """

    mode: str
    capability: Capability | None
    weight: torch.dtype
    activation: torch.dtype
    in_features: int
    tokens: int
    native: bool = False
    rank: int = 0
    low_rank: torch.dtype | None = None
    scale_is_one_value: bool = True


def _declined(facts: Facts) -> str | None:
    """Why no kernel of ours computes this, or None."""
    if facts.mode == "modelopt":
        return "compute='modelopt' reproduces ModelOpt's simulation, which no kernel does"
    if facts.capability is None:
        return "the Triton kernels need an NVIDIA GPU"
    if facts.capability < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of sm_80 or later"
    if facts.activation not in HALF_DTYPES:
        return f"the kernels take bfloat16 and float16 activations, not {_name(facts.activation)}"
    if facts.rank and facts.low_rank is not facts.activation:
        return f"activations are {_name(facts.activation)}, the low-rank factors {_name(facts.low_rank)}"
    if facts.in_features % 16:
        return f"in_features {facts.in_features} is not a multiple of 16"
    if facts.rank > MAX_RANK:
        return f"rank {facts.rank} is above {MAX_RANK}"
    if not facts.scale_is_one_value:
        return "input_scale has several values"
    e4m3 = facts.weight == torch.float8_e4m3fn or facts.mode == "fp8"
    if e4m3 and facts.capability < (8, 9):
        return "e4m3 tensor cores start at sm_89"
    return None


def plan(facts: Facts) -> Plan:
    """The kernels for a linear."""
    declined = _declined(facts)
    if declined:
        return Plan("reference", "", declined)
    computed = arithmetic(facts.mode, facts.tokens, facts.weight == torch.uint8)
    if facts.weight == torch.float8_e4m3fn:
        if computed == "bf16":
            return Plan("dense", "plain", "the e4m3 weight is converted to 16 bits before a 16-bit GEMM")
        return Plan("dense", "fp8", "an e4m3 GEMM")
    if computed == "nvfp4" and facts.native:
        return Plan("blockscaled", "nvfp4_packed", "block-scaled 4-bit tensor cores")
    if computed == "fp8":
        return Plan("dense", "fp8", "the weight is unpacked to e4m3, then an e4m3 GEMM")
    operand = "nvfp4" if computed == "nvfp4" else "plain"
    # Below sm_89 Triton has no e4m3, and Inductor's templates cannot take block scales as bits.
    if facts.tokens <= GEMV_TOKENS and facts.capability >= (8, 9):
        return Plan("gemv", operand, "so few tokens are a read of the weight, which is unpacked in registers")
    return Plan("dense", operand, "the weight is unpacked to 16 bits, then a 16-bit GEMM, exact products")


def separate(up: Plan, down: Plan, facts: Facts, dynamic: bool) -> str | None:
    """Why two linears with GELU between them are computed apart, or None where one kernel finishes the first
    product as the operand of the second.

    Args:
        up, down: their plans.
        facts: of the second one.
        dynamic: whether the second finds its activation's scale per token.
    """
    for which, chosen in (("first", up), ("second", down)):
        if (chosen.kernel, chosen.operand) != ("dense", "fp8"):
            return f"the {which} linear is no e4m3 GEMM"
    if facts.capability >= (10, 0):
        return "on this GPU the fused kernel was never measured"
    if dynamic:
        return "the second linear's scale depends on whole tokens"
    if facts.rank > FEED_FORWARD_RANK:
        return f"rank {facts.rank} is above {FEED_FORWARD_RANK}"
    return None


def apart(plans: Sequence[Plan], head_dim: int, capability: Capability) -> str | None:
    """Why attention's operands are made apart from the linears they come from, or None where one kernel finishes the
    products of both streams as normalised and rotated heads.

    Args:
        plans: of the linears of all streams.
        head_dim: elements of a head.
        capability: of the GPU.
    """
    reason = in_turn(plans, capability)
    if reason is None and head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} elements, of which a tile holds no whole number"
    return reason


def in_turn(plans: Sequence[Plan], capability: Capability) -> str | None:
    """Why linears of several streams are computed one by one, or None where one kernel may compute them all.

    Args:
        plans: of the linears of all streams.
        capability: of the GPU.
    """
    if any((chosen.kernel, chosen.operand) != ("dense", "fp8") for chosen in plans):
        return "a linear is no e4m3 GEMM"
    if capability >= (10, 0):
        return "on this GPU the fused kernel was never measured"
    return None


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
