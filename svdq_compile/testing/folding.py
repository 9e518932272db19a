"""What a linear would lose if its low-rank pair were folded into an e4m3 weight, an option that does not exist.

    y = (e4m3(x_hat / a) @ w.T) * (a * b) + bias,    w = e4m3((R + L1 @ L2) / b)

Random weights of Qwen-Image's width:

    python -m svdq_compile.testing.folding

Exports, the first of them folded and the others in fp8 mode beside it, with the options of docs/quality.md's
``svdq-compile verify`` (``--against`` and all that describes the pictures). PROMPTS holds the demo's calibration
prompts, one a line:

    make demo
    svdq-compile quantize examples/demo/pipeline --output demo-output/fp8 --format fp8 --blocks-kept 1 \\
        --prompts PROMPTS --steps 8 --width 64 --height 64 --cfg 2.5 --seed 1000000 --device cpu
    python -m svdq_compile.testing.folding demo-output/nvfp4_svd demo-output/nvfp4 demo-output/fp8 OPTIONS

ModelOpt's recorded linears are measured by tests/ops/test_folding.py.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..model.load import load_transformer, quantised_linears
from ..ops import codec, reference
from ..ops.weight import SVDQWeight
from ..quality.metrics import sqnr
from ..quantization.data_free import quantize_weight
from ..spec import COMPONENTS, E2M1_MAX, E4M3_MAX, Format

SCALES = {"folded, a scale per tensor": False, "folded, a scale per out-channel": True}
"""Name of a way to fold -> whether every out-channel has a scale of its own."""

Parts = dict[str, torch.Tensor]
"""The stored tensors of a weight by component name."""


def round_weight(weight: torch.Tensor, per_channel: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``w = e4m3(W / b)`` with ``b = amax / 448`` of the tensor or of each out-channel.

    Args:
        weight: W, float32 [N, K].
        per_channel: whether every out-channel has a scale of its own.

    Returns:
        w float8_e4m3fn [N, K]; b float32, a scalar or [N].
    """
    scale = weight.abs().amax(1 if per_channel else (0, 1)) / E4M3_MAX
    return codec.round_e4m3(weight / (scale.unsqueeze(1) if per_channel else scale)), scale


def folded(x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, per_channel: bool) -> torch.Tensor:
    """The folded linear before its one rounding; smoothing and the activation's scale are those of fp8 mode.

    Args:
        x: activations [..., K].
        parts: of an NVFP4_SVD weight.
        bias: [N] or None.
        per_channel: as for :func:`round_weight`.

    Returns:
        float32 [..., N].
    """
    residual = codec.decode_nvfp4(codec.unpack_codes(parts["qweight"]), parts["weight_scale"])
    whole = residual * parts["weight_scale_2"] + parts["lora_up"].float() @ parts["lora_down"].float()
    weight, scale = round_weight(whole, per_channel)
    step = parts["input_scale"].float() * E2M1_MAX if "input_scale" in parts else None
    smoothing = parts.get("pre_quant_scale")
    return reference.linear_wide(x, weight, scale, None, step, smoothing, None, None, bias, "fp8")


def stored(x: torch.Tensor, parts: Parts, bias: torch.Tensor | None, arithmetic: str) -> torch.Tensor:
    """The linear as it is, in an arithmetic of the reference. Arguments and result as :func:`folded`."""
    return reference.linear_wide(x, *(parts.get(name) for name in COMPONENTS), bias, arithmetic)


def random_weights(width: int, strength: float, tokens: int = 256) -> dict[str, dict[str, float]]:
    """SQNR in dB of a linear whose weight is noise and 32 stronger directions, quantised to rank 32 without data.

    ``W = noise + U @ diag(strength .. 0.3 * strength) @ V.T`` in bfloat16, the noise's largest singular value about 1;
    normal activations with every hundredth channel ten times as large.

    Args:
        width: in_features and out_features.
        strength: the largest of the directions.
        tokens: M.

    Returns:
        ``share``: of the low-rank branch in the output's energy (no dB). ``unquantised`` and ``bf16``: how far each way
        to compute is from the unquantised linear, and from the export's bf16 mode.
    """
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    noise = draw(width, width) / (2 * width**0.5)
    u, v = (torch.linalg.qr(draw(width, 32)).Q for _ in range(2))
    weight = (noise + (u * torch.linspace(1, 0.3, 32) * strength) @ v.T).bfloat16()
    x = draw(tokens, width)
    x[:, ::100] *= 10
    x = x.bfloat16()
    dense = x.float() @ weight.float().T
    svd, plain = (quantize_weight(weight, format)[1] for format in (Format.NVFP4_SVD, Format.NVFP4))
    exact = stored(x, svd, None, "bf16")
    ways = {mode: stored(x, svd, None, mode) for mode in ("nvfp4", "fp8")}
    ways |= {name: folded(x, svd, None, per_channel) for name, per_channel in SCALES.items()}
    own = {name: sqnr(y, exact) for name, y in ways.items()}
    w, scale = round_weight(weight.float(), False)
    ways |= {"bf16": exact, "plain NVFP4, fp8": stored(x, plain, None, "fp8")}
    ways["FP8"] = stored(x, {"qweight": w, "weight_scale": scale}, None, "fp8")
    branch = reference.low_rank(x.float(), svd["lora_down"].float(), svd["lora_up"].float())
    share = (branch.square().sum() / dense.square().sum()).item()
    return {"share": {"": share}, "unquantised": {name: sqnr(y, dense) for name, y in ways.items()}, "bf16": own}


def folded_model(path: str, dtype: torch.dtype, per_channel: bool) -> nn.Module:
    """An export in fp8 mode whose linears with a low-rank branch are folded."""
    model = load_transformer(path, dtype=dtype, compute="fp8", storage="expanded")
    layers = quantised_linears(model)
    for name, packed in quantised_linears(load_transformer(path, dtype=dtype)).items():
        if has_branch(packed.weight):
            layers[name].forward = functools.partial(_forward, packed.weight.parts(), packed.bias, per_channel)
    return model


def _forward(parts: Parts, bias: torch.Tensor | None, per_channel: bool, x: torch.Tensor) -> torch.Tensor:
    return folded(x, parts, bias, per_channel).to(x.dtype)


def has_branch(weight: SVDQWeight) -> bool:
    """Whether a weight has a low-rank pair that is not empty."""
    return weight.spec.rank > 0


def variants(paths: Sequence[str], dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
    """Every way to compute the first checkpoint, then the others in fp8 mode."""
    first, *others = paths
    for compute in ("bf16", "nvfp4"):
        yield f"{first}, {compute}", load_transformer(first, dtype=dtype, compute=compute)
    # Expanded, so that few tokens are rounded to e4m3 as well.
    yield f"{first}, fp8", load_transformer(first, dtype=dtype, compute="fp8", storage="expanded")
    for name, per_channel in SCALES.items():
        yield f"{first}, {name}", folded_model(first, dtype, per_channel)
    for path in others:
        yield f"{path}, fp8", load_transformer(path, dtype=dtype, compute="fp8", storage="expanded")


def compare_exports(argv: Sequence[str]) -> None:
    """Prints SQNR of the linears that have a branch in the first checkpoint, of the whole model, and pictures' PSNR."""
    from .. import cli
    from ..cli import verify
    from ..verification import verify as compare

    args = cli._parser().parse_args(["verify", *argv])
    verify.complete(args)
    run, dense = verify.denoise(args, verify.chosen_prompts(args), torch.device("cpu"))
    exact = load_transformer(args.paths[0], dtype=dense.dtype, compute="bf16")
    names = {name for name, layer in quantised_linears(exact).items() if has_branch(layer.weight)}
    inputs = [call.inputs for call in run.calls]
    print(f"{len(names)} linears, {len(inputs)} forward passes; SQNR worst, median, best; model's SQNR; PSNR")
    for name, model in variants(args.paths, dense.dtype):
        for against, other in {"unquantised": dense, "bf16": exact}.items():
            found = compare(model, other, inputs)
            decibels = sorted(row.sqnr for row in found.rows if row.name in names)
            text = " ".join(f"{f(decibels):6.2f}" for f in (min, statistics.median, max))
            print(f"{name}, against {against}: {text}  {found.model.sqnr:6.2f}", flush=True)
        print(f"{name}: PSNR {run.compare(model).psnr:.2f}", flush=True)


def compare_random_weights() -> None:
    """Prints the table of numerics.md for random weights."""
    for strength in (0.0, 3.0, 10.0, 30.0, 100.0):
        for against, row in random_weights(3072, strength).items():
            print(f"{strength:5} {against}", {name: round(value, 3) for name, value in row.items()}, flush=True)


if __name__ == "__main__":
    compare_exports(sys.argv[1:]) if sys.argv[1:] else compare_random_weights()
