"""What the lowering knows of one ``svdq::linear`` in Inductor's graph."""

from __future__ import annotations

import dataclasses
import math

import sympy
import torch

from .. import _compat
from .._compat import ir
from ..ops.cuda import FP8_SCALE_FACTOR, capability
from ..ops.modes import resolve
from ..ops.native import has_native_fp4
from ..ops.plan import GEMV_TOKENS, MANY, Facts, plan
from ..spec import Format


@dataclasses.dataclass(frozen=True)
class Unwritten:
    """Stands for the activation of a linear whose operand is made without it ever being in memory."""

    size: tuple[sympy.Expr | int, ...]
    dtype: torch.dtype
    device: torch.device

    def get_size(self) -> tuple[sympy.Expr | int, ...]:
        return self.size

    def get_dtype(self) -> torch.dtype:
        return self.dtype

    def get_device(self) -> torch.device:
        return self.device


class Call:
    """One call: its operands (the operator's arguments, tensors as TensorBox), sizes, and plan.

    Attributes:
        tokens: M, possibly symbolic; ``hint`` is a likely value.
        in_features, out_features, rank: K, N, R.
        packed: whether the weight is 4 bits.
        capability: of the device.
        facts, plan: the kernels that compute it, and what they depend on.
    """

    def __init__(
        self,
        x,
        qweight,
        weight_scale,
        weight_scale_2,
        input_scale,
        pre_quant_scale,
        lora_down,
        lora_up,
        bias,
        compute="auto",
    ):
        self.x, self.qweight, self.weight_scale, self.weight_scale_2 = x, qweight, weight_scale, weight_scale_2
        self.input_scale, self.pre_quant_scale, self.bias = input_scale, pre_quant_scale, bias
        self.rank = 0 if lora_down is None else int(lora_down.get_size()[0])
        self.lora_down, self.lora_up = (lora_down, lora_up) if self.rank else (None, None)
        *self.leading, k = x.get_size()
        self.in_features, self.out_features = int(k), int(qweight.get_size()[0])
        self.tokens: sympy.Expr = sympy.Mul(*self.leading)
        # Few tokens are computed otherwise, so which side of the line they are on must hold for every later call.
        few = _compat.at_most(self.tokens, GEMV_TOKENS)
        self.hint = (
            min(_compat.size_hint(self.tokens), GEMV_TOKENS) if few else max(_compat.size_hint(self.tokens), MANY)
        )
        self.packed = qweight.get_dtype() == torch.uint8
        self.dtype: torch.dtype = x.get_dtype()
        self.device: torch.device = x.get_device()
        self.capability = capability(self.device)
        self.facts = Facts(
            mode=resolve(compute, Format.NVFP4 if self.packed else Format.FP8, self.device),
            capability=self.capability,
            native=has_native_fp4(self.device),
            weight=qweight.get_dtype(),
            activation=self.dtype,
            in_features=self.in_features,
            tokens=self.hint,
            rank=self.rank,
            low_rank=self.lora_down.get_dtype() if self.rank else None,
            scale_is_one_value=input_scale is None or math.prod(input_scale.get_size()) == 1,
        )
        self.plan = plan(self.facts)

    @property
    def dynamic(self) -> bool:
        """Whether the activation's scale is found per token."""
        return self.input_scale is None

    @property
    def factor_a(self) -> float:
        """What ``input_scale`` is multiplied with to be the operand's scale."""
        static_fp8 = self.plan.operand == "fp8" and self.packed and not self.dynamic
        return FP8_SCALE_FACTOR if static_fp8 else 1.0

    @property
    def layout(self) -> ir.Layout:
        """Of the result, [M, N] contiguous."""
        n = sympy.Integer(self.out_features)
        return ir.FixedLayout(self.device, self.dtype, [self.tokens, n], [n, sympy.Integer(1)])
