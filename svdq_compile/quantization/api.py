"""``svdq_compile.quantize``: a model in, a quantised model out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn

from ..model.bind import unwrap
from ..model.load import device_of, load_transformer
from ..ops.modes import check_compute
from .modelopt import export
from .recipes import TEXT_AND_MODULATION, Recipe


def quantize(
    model: nn.Module,
    forward_loop: Callable[[nn.Module], Any],
    *,
    format: str = "nvfp4_svd",
    rank: int = 32,
    blocks_kept: int = 2,
    skip: tuple[str, ...] = TEXT_AND_MODULATION,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    compute: str = "auto",
) -> nn.Module:
    """Calibrates and quantises a diffusers transformer with NVIDIA ModelOpt, through its real file format.

    The model itself stays as it is; ModelOpt works on a copy, so memory must hold the model twice.

        def calibrate(transformer):
            own, pipe.transformer = pipe.transformer, transformer
            try:
                for prompt in prompts:
                    pipe(prompt, num_inference_steps=30, output_type="latent")
            finally:
                pipe.transformer = own

        quantised = svdq_compile.quantize(pipe.transformer, calibrate, output="qwen-image-nvfp4-svd")

    Args:
        model: the transformer, in the dtype the checkpoint shall have (bfloat16 as a rule).
        forward_loop: runs calibration inputs through the model it is given, a copy; called up to three times.
        format: ``nvfp4_svd``, ``nvfp4`` or ``fp8``.
        rank: rank of the low-rank branch.
        blocks_kept: blocks at each end that stay unquantised.
        skip: globs of linears that become plain NVFP4 in an ``nvfp4_svd`` checkpoint; ``()`` for none.
        output: folder for the checkpoint; without it the files are temporary.
        seed: seed of everything random.
        compute: compute mode of the result.

    Returns:
        A new model with the checkpoint's weights, on the model's device.

    Raises:
        OptionError: no such compute mode.
        QuantizeError: the model cannot be quantised as asked or is quantised already, or ``forward_loop`` does not
            run the model it is given.
        MissingPackageError: ModelOpt or onnx is not installed.
    """
    check_compute(compute)
    inner = unwrap(model)
    recipe = Recipe(format, rank, blocks_kept, skip)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export(inner, forward_loop, scratch if output is None else output, recipe, seed=seed)
        return load_transformer(folder, device_of(inner), compute=compute)
