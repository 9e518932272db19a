"""Safetensors' dtype names and torch's dtypes, one table both ways."""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
"""safetensors spelling -> torch dtype, for every dtype a manifest can hold."""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""torch dtype -> safetensors spelling."""
