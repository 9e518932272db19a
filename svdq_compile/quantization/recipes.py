"""What is quantised and how: the settings of one export, and the ModelOpt configuration they stand for."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from ..errors import QuantizeError
from ..spec import GROUP_SIZE, Format

TEXT_AND_MODULATION = (
    "*.attn.add_q_proj",
    "*.attn.add_k_proj",
    "*.attn.add_v_proj",
    "*.attn.to_add_out",
    "*.txt_mlp.net.0.proj",
    "*.txt_mlp.net.2",
    "*.img_mod.1",
    "*.txt_mod.1",
)
"""The linears of a Qwen-Image block that ModelOpt's recipe leaves without a low-rank branch."""

BLOCKS = "transformer_blocks"
"""Name of the module list whose linears are quantised; everything outside it keeps the model's dtype."""

_NVFP4_QUANTIZER = {
    "num_bits": (2, 1),
    "axis": None,
    "block_sizes": {-1: GROUP_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
}
_FP8_QUANTIZER = {"num_bits": (4, 3), "axis": None}
_QUANTIZERS = {Format.NVFP4_SVD: _NVFP4_QUANTIZER, Format.NVFP4: _NVFP4_QUANTIZER, Format.FP8: _FP8_QUANTIZER}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of one export. The defaults are ModelOpt's recipe for Qwen-Image.

    Args:
        format: NVFP4_SVD (smoothing and a low-rank branch), NVFP4 or FP8 (largest-magnitude calibration).
        rank: R of the low-rank branch, 1 or more; only NVFP4_SVD uses it.
        blocks_kept: blocks at each end that stay unquantised.
        skip: globs of linears that become plain NVFP4 in an NVFP4_SVD export; ``()`` gives every linear a
            low-rank branch. The other formats ignore it.

    Raises:
        QuantizeError: a setting is out of range.
    """

    format: Format = Format.NVFP4_SVD
    rank: int = 32
    blocks_kept: int = 2
    skip: tuple[str, ...] = TEXT_AND_MODULATION

    def __post_init__(self) -> None:
        if self.format in _QUANTIZERS:
            # A string compares equal to its Format, but later `is` tests need the member.
            object.__setattr__(self, "format", Format(self.format))
        else:
            formats = ", ".join(str(format) for format in _QUANTIZERS)
            raise QuantizeError(f"cannot quantise to format {str(self.format)!r}; possible: {formats}")
        if self.rank < 1:
            raise QuantizeError(f"rank must be 1 or more, not {self.rank}; for no low-rank branch use format nvfp4")
        if self.blocks_kept < 0:
            raise QuantizeError(f"blocks_kept must be 0 or more, not {self.blocks_kept}")
        if isinstance(self.skip, str):
            raise QuantizeError(f"skip takes a tuple of globs, not the string {self.skip!r}")

    def quantized_blocks(self, num_blocks: int) -> range:
        """Indices of the blocks that are quantised.

        Args:
            num_blocks: how many blocks the model has.

        Raises:
            QuantizeError: no block would be left.
        """
        blocks = range(self.blocks_kept, num_blocks - self.blocks_kept)
        if not blocks:
            raise QuantizeError(
                f"keeping {self.blocks_kept} blocks at each end leaves none of {num_blocks} to quantise; "
                "lower blocks_kept"
            )
        return blocks


def quant_config(recipe: Recipe, num_blocks: int) -> dict[str, Any]:
    """The recipe as ``modelopt.torch.quantization.quantize`` takes it (0.47's list of rules, later ones win).

    Nothing but linears is quantised. ModelOpt's own Qwen-Image recipe also switches on the input quantisers
    of the blocks' LayerNorms, which disturb calibration and are not exported.

    Args:
        recipe: the settings.
        num_blocks: how many blocks the model has.

    Returns:
        ``{"quant_cfg": [...], "algorithm": ...}``.

    Raises:
        QuantizeError: no block would be left to quantise.
    """
    quantizer = _QUANTIZERS[recipe.format]
    quantized = recipe.quantized_blocks(num_blocks)
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for role in ("weight", "input"):
        name = f"{BLOCKS}.*.{role}_quantizer"
        rules.append({"quantizer_name": name, "parent_class": "nn.Linear", "cfg": copy.deepcopy(quantizer)})
    kept = (index for index in range(num_blocks) if index not in quantized)
    rules += [{"quantizer_name": f"{BLOCKS}.{index}.*", "enable": False} for index in kept]
    algorithm: Any = "max"
    if recipe.format is Format.NVFP4_SVD:
        algorithm = {"method": "svdquant", "lowrank": recipe.rank, "skip_layers": list(recipe.skip)}
    return {"quant_cfg": rules, "algorithm": algorithm}
