"""No time without a right result, for a whole transformer.

Two blocks of the real width are compared with float64. All blocks are too many for that; they are compared with the
same kernels run one by one, by the same budget. Both references are made before anything is compiled.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..ops import modes, reference
from ..ops.weight import SVDQWeight
from ..testing.oracle import assert_within_budget, relative_error
from .gate import Bf16Products, Verdict


@dataclasses.dataclass(frozen=True)
class References:
    """What one model's result is compared with.

    Args:
        oracle: the better computation.
        low_precision: the specification with BF16 products.
    """

    oracle: torch.Tensor
    low_precision: torch.Tensor

    def judge(self, y: torch.Tensor) -> Verdict:
        """Whether a result is within the budget of :mod:`svdq_compile.testing.oracle`."""
        if not bool(y.isfinite().all()):
            return Verdict(False, reason="the result is not finite")
        error = relative_error(y, self.oracle)
        try:
            assert_within_budget(y, self.oracle, low_precision=self.low_precision)
        except AssertionError as wrong:
            return Verdict(False, error, str(wrong))
        return Verdict(True, error)


class SpecifiedLinears(TorchFunctionMode):
    """Inside, quantised linears are the specification with BF16 products, on any device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.linear or not isinstance(args[1], SVDQWeight):
            return func(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        weight_mode = modes.resolve(weight.fingerprint.compute, weight.spec.format, x.device)
        arithmetic = modes.arithmetic(weight_mode, math.prod(x.shape[:-1]), weight.spec.storage == "packed")
        parts = dict.fromkeys(("weight_scale_2", "input_scale", "pre_quant_scale", "lora_down", "lora_up"))
        with Bf16Products():
            return reference.linear_wide(x, **parts | weight.parts(), bias=bias, arithmetic=arithmetic).to(x.dtype)


def against_float64(model: nn.Module, inputs: dict[str, Any]) -> References:
    """References of a small model, in float64 and in BF16.

    Args:
        model: not compiled; copied.
        inputs: of its forward.
    """
    wide_model = copy.deepcopy(model).double()
    # Fast attention has no float64.
    wide_model.set_attention_backend("native")
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return References(wide_model(**wide)[0], _specified(model, inputs))


def against_eager(model: nn.Module, inputs: dict[str, Any]) -> References:
    """References of a large model: the kernels run one by one, and the specification in BF16.

    Args:
        model: not compiled.
        inputs: of its forward.
    """
    return References(model(**inputs)[0], _specified(model, inputs))


def _specified(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with SpecifiedLinears():
        return model(**inputs)[0]
