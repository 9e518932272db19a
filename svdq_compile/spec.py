"""The vocabulary every other module speaks: formats, components of a quantised linear, and what fits together.

Letters: M tokens, K in_features, N out_features, R rank, G group size. Dtypes are written in the safetensors
spelling (``BF16``, ``F8_E4M3``, ``U8``, ``F32``), so this module needs neither torch nor a GPU.
"""

from __future__ import annotations

import dataclasses
import enum

GROUP_SIZE = 16
"""Inputs that share one e4m3 block scale (NVFP4: 16; MXFP4 would be 32)."""

E2M1_MAX = 6.0
"""Largest e2m1 magnitude: 1.5 * 2**2 (OCP MX v1.0, table 5)."""

E4M3_MAX = 448.0
"""Largest finite e4m3 ("fn" variant) magnitude: 1.75 * 2**8 (OCP FP8 v1.0, table 1)."""

E4M3_MIN = 2.0**-9
"""Smallest positive e4m3 value, a subnormal: 2**-6 * 2**-3."""

MODEL_DTYPES = ("BF16", "F16", "F32")
"""Dtypes a pipeline can be exported in; bias, pre_quant_scale and LoRA factors carry the model's dtype."""


STORAGES = ("packed", "expanded")
"""How quantised weights lie in memory: as in the file, or NVFP4 and NVFP4_SVD as FP8_SVD."""


class Format(str, enum.Enum):
    """How one linear's weight is stored. The value is the name the command line prints.

    FP8_SVD is in no file: it is what an NVFP4 or NVFP4_SVD weight becomes with ``storage="expanded"``.
    """

    NVFP4_SVD = "nvfp4_svd"
    NVFP4 = "nvfp4"
    FP8 = "fp8"
    FP8_SVD = "fp8_svd"
    DENSE = "dense"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class Component:
    """What one stored tensor of a quantised linear must look like."""

    shape: tuple[int, ...]
    dtype: str


COMPONENTS = (
    "qweight",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "lora_down",
    "lora_up",
)
"""Our names of the tensors that stand for one weight, in the order the operator takes them."""

MODELOPT_LEAF = {
    "qweight": "weight",
    "weight_scale": "weight_scale",
    "weight_scale_2": "weight_scale_2",
    "input_scale": "input_scale",
    "pre_quant_scale": "pre_quant_scale",
    "lora_down": "svdquant_lora_a",
    "lora_up": "svdquant_lora_b",
}
"""Our component name -> the last part of ModelOpt's key."""

COMPONENT_OF_LEAF = {leaf: name for name, leaf in MODELOPT_LEAF.items()}
"""The last part of ModelOpt's key -> our component name."""


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """One quantised linear, without its name: equal specs can share compiled code.

    The spec is the fingerprint a weight carries through ``torch.compile``. It holds nothing that differs
    between two blocks of the same recipe, so all blocks of a model share one compiled graph.

    Args:
        format: storage format.
        out_features: N.
        in_features: K, a multiple of ``group_size`` for the NVFP4 formats.
        rank: R, columns of ``lora_up``; 0 without a low-rank branch. An NVFP4_SVD weight of rank 0 has an empty pair,
            an FP8_SVD weight of rank 0 has none.
        dtype: model dtype of the low-rank pair and of ``pre_quant_scale`` (safetensors spelling).
        smooth: whether ``pre_quant_scale`` is present.
        dynamic: whether the activation scale is computed per token at run time (no ``input_scale`` stored).
        group_size: inputs per block scale.
    """

    format: Format
    out_features: int
    in_features: int
    rank: int = 0
    dtype: str = "BF16"
    smooth: bool = False
    dynamic: bool = False
    group_size: int = GROUP_SIZE

    @property
    def storage(self) -> str:
        """``expanded`` for FP8_SVD, else ``packed``: as the checkpoint has it."""
        return "expanded" if self.format is Format.FP8_SVD else "packed"

    @property
    def has_low_rank(self) -> bool:
        """Whether ``lora_down`` and ``lora_up`` are among the components."""
        return self.format is Format.NVFP4_SVD or (self.format is Format.FP8_SVD and self.rank > 0)

    def components(self) -> dict[str, Component]:
        """Every tensor this linear is made of, by our component name, with its exact shape and dtype."""
        n, k, r, g = self.out_features, self.in_features, self.rank, self.group_size
        scalar = Component((), "F32")
        if self.format in (Format.FP8, Format.FP8_SVD):
            parts = {"qweight": Component((n, k), "F8_E4M3"), "weight_scale": scalar}
        else:
            parts = {
                "qweight": Component((n, k // 2), "U8"),
                "weight_scale": Component((n, k // g), "F8_E4M3"),
                "weight_scale_2": scalar,
            }
        if not self.dynamic:
            parts["input_scale"] = scalar
        if self.smooth:
            parts["pre_quant_scale"] = Component((k,), self.dtype)
        if self.has_low_rank:
            parts["lora_down"] = Component((r, k), self.dtype)
            parts["lora_up"] = Component((n, r), self.dtype)
        return parts

    def describe(self) -> str:
        """One short phrase for messages: ``nvfp4_svd 3072->12288 rank 32``."""
        text = f"{self.format} {self.in_features}->{self.out_features}"
        if self.has_low_rank:
            text += f" rank {self.rank}" + ("" if self.smooth else " unsmoothed")
        return text + (" dynamic" if self.dynamic else "")
