"""Activations become GEMM operands: smoothed, quantised, and projected down, in one pass over x.

    x_hat    = x * s                    rounded once to x's dtype
    operand  = quantize(x_hat)          see svdq_kernels.operand.OPERANDS
    partials = x @ (s * L2).T           per slice of K; their sum is the low-rank branch's h

The product with L2 takes s on L2's side, so that x goes from memory to the tensor core untouched; that rounds L2 * s
where the formula rounds x * s, to the same number of bits. So it does with an x that is normalised and modulated first,
whose L2 is made once for all of its tiles:

    partials = (x @ D.T - mean * sums[0]) * deviation + sums[1]         D and sums: see svdq_kernels.modulation

Beside an e4m3 operand partials are rounded to x's dtype: to write and read them in float32 takes time that shows.
"""

import torch
import triton
import triton.language as tl

from . import few
from .fp4 import GROUP, magnitude_bits
from .modulation import modulate
from .operand import OPERANDS, TOKEN_RANGE, modulated, nvfp4_values, smooth
from .projection import BLOCK, beside_arguments, sum_block, sum_partials, write_sum


@triton.jit
def _token_scale_kernel(x_ptr, s_ptr, t_ptr, K, stride_xm, TOKEN_RANGE: tl.constexpr, BLOCK_K: tl.constexpr):
    """``t = amax(x_hat) / TOKEN_RANGE`` of one token; 1 for an all-zero token, NaN for one that holds NaN.

    Args:
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: t float32 [M].
    """
    row = tl.program_id(0).to(tl.int64)
    bits = tl.zeros((1, BLOCK_K), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        x_hat = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0)[None, :]
        if s_ptr is not None:
            x_hat = smooth(x_hat, tl.load(s_ptr + offs_k, mask=offs_k < K, other=0.0))
        bits = tl.maximum(bits, magnitude_bits(x_hat.to(tl.float32)))
    amax = tl.max(tl.max(bits, axis=1), axis=0).to(tl.float32, bitcast=True)
    t = tl.div_rn(amax, TOKEN_RANGE)
    tl.store(t_ptr + row, tl.where(t == 0, 1.0, t))


@triton.jit
def load_sums(sums_ptr, offs_r, split, R):
    """D's two sums over slice ``split`` of K.

    Args:
        sums_ptr: float32 [slices, 2, R].
        offs_r: ranks.
    """
    sums_ptr += 2 * split * R + offs_r
    return tl.load(sums_ptr, mask=offs_r < R, other=0.0), tl.load(sums_ptr + R, mask=offs_r < R, other=0.0)


@triton.jit
def write_operand(
    x, s, t, reciprocal, mean, deviation, gain, shift, operand_ptr, row, offs_k, mask, K, OPERAND: tl.constexpr
):
    """Stores the operand of a tile of x; None for what does not apply, other arguments as :func:`prepare_tile`'s.

    Args:
        x: [tokens, columns].
        s, gain, shift: of its columns, gain with 1 added.
        t, reciprocal, mean, deviation: of its tokens, reciprocal ``1 / a``.
        row, offs_k, mask: its tokens and columns, and which of its elements there are.
    """
    x_hat = x
    if mean is not None:
        x_hat = modulated(x, mean, deviation, gain, shift)
    if s is not None:
        x_hat = smooth(x_hat, s)
    values = x_hat
    if OPERAND == "fp8":
        # The conversion saturates and keeps NaN (PTX cvt.rn.satfinite).
        values = x_hat.to(tl.float32) * reciprocal[:, None]
    elif OPERAND == "nvfp4":
        values = nvfp4_values(x_hat.to(tl.float32), t[:, None, None])
    values = values.to(operand_ptr.dtype.element_ty)
    tl.store(operand_ptr + row[:, None] * K + offs_k[None, :], values, mask=mask)


@triton.jit
def prepare_tile(
    split,
    block_m,
    x_ptr,
    s_ptr,
    t_ptr,
    down_ptr,
    mean_ptr,
    deviation_ptr,
    gain_ptr,
    shift_ptr,
    sums_ptr,
    operand_ptr,
    partials_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_tm,
    OPERAND: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
):
    """Operand and partial down-projection of BLOCK_M tokens and SPLIT_K inputs.

    Args:
        split, block_m: which inputs and which tokens.
        x_ptr: x [M, K], unit column stride.
        s_ptr: s [K] or None.
        t_ptr: tensor scale, float32, one value (stride_tm 0) or [M] (stride_tm 1); None for a plain operand.
        down_ptr: L2 [R, K] contiguous, x's dtype, or D of an x that is modulated; None without a low-rank branch.
        mean_ptr, deviation_ptr: float32 [M], to normalise and modulate x first (:func:`modulated`); None to take it
            as it is.
        gain_ptr, shift_ptr: [K], likewise.
        sums_ptr: D's, float32 [ceil(K / SPLIT_K), 2, R], likewise.
        operand_ptr: result [M, K] contiguous; None to not store it.
        partials_ptr: [ceil(K / SPLIT_K), M, R] contiguous.
        SCALE_FACTOR: fp8 divides by ``a = SCALE_FACTOR * t``.
        RANK: R rounded up to a size tl.dot takes, 0 without a low-rank branch.
        WGMMA: whether tl.dot is an instruction that goes on by itself, as on sm_90.
    """
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    row = offs_m.to(tl.int64)
    t = None if t_ptr is None else tl.load(t_ptr + row * stride_tm, mask=mask_m, other=1.0)
    reciprocal = None if t is None else tl.div_rn(tl.full((BLOCK_M,), 1.0, tl.float32), t * SCALE_FACTOR)
    mean = None if mean_ptr is None else tl.load(mean_ptr + row, mask=mask_m, other=0.0)
    deviation = None if mean_ptr is None else tl.load(deviation_ptr + row, mask=mask_m, other=0.0)
    offs_r = tl.arange(0, RANK if RANK else 16)
    # Loaded ahead of the loop, unless the operand takes the registers.
    EARLY: tl.constexpr = mean_ptr is not None and RANK > 0 and WGMMA and OPERAND == "fp8"
    if EARLY:
        of_down, of_shift = load_sums(sums_ptr, offs_r, split, R)
    # Ahead of a product that waits for L2, where there are registers for both and no other step to load for.
    AHEAD: tl.constexpr = STAGES == 1 and RANK <= 64 and OPERAND == "fp8"
    h = tl.zeros((BLOCK_M, RANK if RANK else 16), dtype=tl.float32)
    if WGMMA:
        # Never true, which LLVM knows, but not Triton.
        never = tl.load(x_ptr).to(tl.float32) > float("inf")
    for start in tl.range(0, SPLIT_K, BLOCK_K, num_stages=STAGES):
        offs_k = split * SPLIT_K + start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
        s = None if s_ptr is None else tl.load(s_ptr + offs_k, mask=mask_k, other=0.0)
        gain, shift = None, None
        if mean_ptr is not None:
            gain = 1.0 + tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            shift = tl.load(shift_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        if RANK > 0:
            mask_down = (offs_r < R)[:, None] & mask_k[None, :]
            down = tl.load(down_ptr + offs_r[:, None] * K + offs_k[None, :], mask=mask_down, other=0.0)
        if operand_ptr is not None and AHEAD:
            write_operand(x, s, t, reciprocal, mean, deviation, gain, shift, operand_ptr, row, offs_k, mask, K, OPERAND)
        if RANK > 0:
            if mean_ptr is None and s_ptr is not None:
                down = smooth(down, s)
            h = tl.dot(x, tl.trans(down), h)
            if WGMMA:
                # Read here, so that the product is complete before copies for later steps overwrite x. Triton leaves
                # one under way from step to step, but gives x no buffer for that, as the operand is made of it too.
                h = tl.where(never, 0.0, h)
        if operand_ptr is not None and not AHEAD:
            write_operand(x, s, t, reciprocal, mean, deviation, gain, shift, operand_ptr, row, offs_k, mask, K, OPERAND)
    if mean_ptr is not None and RANK > 0:
        # The tensor core took x as it lies in memory.
        if EARLY:
            of_down, of_shift = tl.where(never, 0.0, of_down), tl.where(never, 0.0, of_shift)
        else:
            of_down, of_shift = load_sums(sums_ptr, offs_r, split, R)
        h = (h - mean[:, None] * of_down[None, :]) * deviation[:, None] + of_shift[None, :]
    if RANK > 0:
        where = (split.to(tl.int64) * M + row)[:, None] * R + offs_r[None, :]
        mask_h = mask_m[:, None] & (offs_r < R)[None, :]
        tl.store(partials_ptr + where, h.to(partials_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _prepare_kernel(
    x_ptr,
    s_ptr,
    t_ptr,
    down_ptr,
    mean_ptr,
    deviation_ptr,
    gain_ptr,
    shift_ptr,
    sums_ptr,
    operand_ptr,
    partials_ptr,
    beside_partials_ptr,
    beside_h_ptr,
    M,
    K,
    R,
    stride_xm,
    stride_tm,
    beside_size,
    OPERAND: tl.constexpr,
    SCALE_FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WGMMA: tl.constexpr,
    BESIDE_SPLITS: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """The whole of x, program (i, j) slice i of K and block j of tokens; arguments as :func:`prepare_tile`'s.

    Args:
        beside_partials_ptr, beside_h_ptr, beside_size, BESIDE_SPLITS: as :func:`.projection.sum_block`'s, the sum of
            another linear that programs behind those of x make; None without one.
    """
    split, block_m = tl.program_id(0), tl.program_id(1)
    blocks_m = tl.cdiv(M, BLOCK_M)
    if beside_partials_ptr is None or block_m < blocks_m:
        prepare_tile(
            split,
            block_m,
            x_ptr,
            s_ptr,
            t_ptr,
            down_ptr,
            mean_ptr,
            deviation_ptr,
            gain_ptr,
            shift_ptr,
            sums_ptr,
            operand_ptr,
            partials_ptr,
            M,
            K,
            R,
            stride_xm,
            stride_tm,
            OPERAND,
            SCALE_FACTOR,
            RANK,
            SPLIT_K,
            BLOCK_M,
            BLOCK_K,
            STAGES,
            WGMMA,
        )
    else:
        block = (block_m - blocks_m) * tl.num_programs(0) + split
        sum_block(block, beside_partials_ptr, beside_h_ptr, beside_size, BESIDE_SPLITS, SUM_BLOCK)


TOKEN_SCALE_BLOCK = 1024
"""Columns a step of the kernel that finds a token's scale takes."""


ROWS = 128
"""A multiple of the rows of every tile that reads an operand."""


def padded_rows(m: int) -> int:
    """Rows an operand is given memory for, so that a GEMM's tiles end inside of it."""
    return -(-m // ROWS) * ROWS


def padded_rank(rank: int) -> int:
    """The rank as tl.dot takes it: a power of two of at least 16; 0 stays 0."""
    return max(16, triton.next_power_of_2(rank)) if rank else 0


def configuration(m: int, k: int, rank: int, operand: str, modulated: bool = False) -> dict[str, int]:
    """Constants of the kernel and its ``num_warps``.

    Up to some hundred tokens: many small programs, one step each, because latency is all there is. Many tokens: slices
    of K enough for :data:`PROGRAMS`, so that memory is never idle; e4m3 has at least :data:`SLICES`, others at most 8.

    Args:
        m, k, rank, operand: M, K, R and the operand; m may be a hint.
        modulated: whether x is normalised and modulated first.
    """
    warps = 4 if rank <= 64 else 8
    if m < MANY_TOKENS:
        if m <= 4 or operand in ("plain", "fp8") or (operand == "nvfp4" and m <= few.MAX_TOKENS):
            split = 128 if k <= 4096 else 256
            return {"SPLIT_K": split, "BLOCK_M": 16, "BLOCK_K": 128, "STAGES": 1, "num_warps": warps}
        # A GEMM that adds the parts of h itself, as it does without an operand, wants few of them.
        split = 256 if operand == "nvfp4" else 768
        return {
            "SPLIT_K": split if k <= 4096 else 2 * split,
            "BLOCK_M": 16 if m <= 64 else 32,
            "BLOCK_K": 64 if modulated and rank else 128,
            "STAGES": 3 if rank <= 128 else 2,
            "num_warps": warps,
        }
    tiles = -(-m // 64)
    if operand == "fp8":
        splits = max(1, min(max(PROGRAMS // tiles, SLICES), k // 128))
    else:
        splits = max(1, min(PROGRAMS // tiles, k // 384, 8))
    split = -(-k // (64 * splits)) * 64
    one_step = split == 128 and not modulated
    steps = {"BLOCK_K": 128, "STAGES": 1} if one_step else {"BLOCK_K": 64, "STAGES": 3}
    return {"SPLIT_K": split, "BLOCK_M": 64, **steps, "num_warps": warps}


MANY_TOKENS = 1024
"""From here on the kernel is bound by memory."""

PROGRAMS = 384
"""Programs of 64 tokens and four warps: about three for each multiprocessor of an H100."""

SLICES = 6
"""Short programs, of which the last ones leave less of the GPU idle."""


def prepare(
    x: torch.Tensor,
    pre_quant_scale: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    lora_down: torch.Tensor | None,
    operand: str,
    scale_factor: float = 1.0,
    config: dict[str, int] | None = None,
    *,
    modulation: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    beside: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The GEMM operand of x, its tensor scale, and the partial down-projections.

    Args:
        x: bfloat16 or float16 [M, K], any strides; copied first unless its rows are contiguous. Without
            ``lora_down`` also float32.
        pre_quant_scale: s [K], or None for no smoothing.
        input_scale: t, float32 with one element, or None for ``amax / TOKEN_RANGE`` per token. Unused by ``plain``
            and ``none``.
        lora_down: L2 [R, K] in x's dtype, or None.
        operand: one of :data:`OPERANDS`.
        scale_factor: ``fp8`` divides by ``a = scale_factor * t``. Only with an ``input_scale``.
        config: what :func:`configuration` returns, to override it.
        modulation: mean and deviation, float32 [M], gain and shift [K], all contiguous: what x is to be normalised and
            modulated with first, as :func:`modulated` says. Not with a scale per token.
        beside: another linear's partials [S, M, R] and its h [1, M, R], which is made as by
            :func:`.projection.sum_partials`, in this launch where it is :func:`_prepare_kernel`'s.

    Returns:
        The operand [M, K], contiguous, a new one the first rows of :func:`padded_rows`: float8_e4m3fn for ``fp8``, else
        x's 16-bit dtype (bfloat16 for float32); None for ``none``. t: the one given, float32 [M, 1], or None for
        ``plain`` and ``none``. Partials [S, M, R] of :func:`partials_dtype`, or where :func:`takes_few` or
        :func:`sums_partials` says so their sum [1, M, R] in x's dtype; or None.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    m, k = x.shape
    check(x, pre_quant_scale, input_scale, lora_down, operand)
    if modulation is not None:
        check_modulation(x, input_scale, operand, *modulation)
    rank = 0 if lora_down is None else lora_down.shape[0]
    few_tokens = config is None and k > 0 and takes_few(m, rank, modulation is not None)
    chosen = (
        few.configuration(k, rank)
        if few_tokens
        else dict(config or configuration(m, k, rank, operand, modulation is not None))
    )
    splits = 1 if few_tokens else triton.cdiv(k, chosen["SPLIT_K"])
    if x.stride(1) != 1:
        x = x.contiguous()
    pre_quant_scale = None if pre_quant_scale is None else pre_quant_scale.contiguous()
    parts_dtype = x.dtype if few_tokens else partials_dtype(operand, x.dtype)
    partials = torch.empty(splits, m, rank, dtype=parts_dtype, device=x.device) if rank else None
    # Tensor descriptors begin at multiples of 16 bytes.
    readable = x.is_contiguous() and x.data_ptr() % 16 == 0
    untouched = pre_quant_scale is None and modulation is None and readable
    as_is = operand == "none" or (operand == "plain" and untouched)
    narrow = torch.bfloat16 if x.dtype == torch.float32 else x.dtype
    dtype = torch.float8_e4m3fn if operand == "fp8" else x.dtype if operand == "plain" else narrow
    result = x if as_is else torch.empty(padded_rows(m), k, dtype=dtype, device=x.device)[:m]
    scaled = operand in TOKEN_RANGE
    t = input_scale if scaled else None
    dynamic = scaled and input_scale is None
    with torch.cuda.device_of(x):
        if dynamic:
            t = torch.empty(m, 1, dtype=torch.float32, device=x.device)
            if m:
                _token_scale_kernel[(m,)](
                    x, pre_quant_scale, t, k, x.stride(0), TOKEN_RANGE=TOKEN_RANGE[operand], BLOCK_K=TOKEN_SCALE_BLOCK
                )
        given = {
            "x_ptr": x,
            "s_ptr": pre_quant_scale,
            "t_ptr": t,
            "down_ptr": lora_down.contiguous() if rank else None,
            "operand_ptr": None if as_is else result,
            "K": k,
            "R": rank,
            "stride_xm": x.stride(0),
            "stride_tm": int(dynamic),
            "OPERAND": operand,
            "SCALE_FACTOR": 1.0 if dynamic else scale_factor,
        }
        if few_tokens and m:
            few._few_kernel[few.grid(m, rank)](h_ptr=partials, **given, **chosen)
        elif m and k and not (as_is and not rank):
            mean, deviation, gain, shift = modulation or (None,) * 4
            down_sums = None
            if modulation is not None and rank:
                [(_, _, given["down_ptr"], down_sums)] = modulate(
                    [None], [pre_quant_scale], [gain], [shift], [given["down_ptr"]], [0.0], [chosen["SPLIT_K"]]
                )
            sums = triton.cdiv(beside[1].numel(), BLOCK) if beside else 0
            _prepare_kernel[(splits, triton.cdiv(m, chosen["BLOCK_M"]) + triton.cdiv(sums, splits))](
                **beside_arguments(beside),
                SUM_BLOCK=BLOCK,
                mean_ptr=mean,
                deviation_ptr=deviation,
                gain_ptr=gain,
                shift_ptr=shift,
                sums_ptr=down_sums,
                partials_ptr=partials,
                M=m,
                RANK=padded_rank(rank),
                WGMMA=uses_wgmma(torch.cuda.get_device_capability(x.device)),
                **given,
                **chosen,
            )
            beside = None
    if beside:
        write_sum(*beside)
    if sums_partials(operand, splits, rank):
        partials = sum_partials(partials, x.dtype)
    return None if operand == "none" else result, t, partials


def uses_wgmma(capability: tuple[int, int]) -> bool:
    """As the kernel's WGMMA."""
    return capability[0] == 9


def takes_few(m: int, rank: int, modulated: bool) -> bool:
    """Whether :mod:`svdq_kernels.few` makes the operand; m may be a hint."""
    return m <= few.MAX_TOKENS and rank > 0 and not modulated


def partials_dtype(operand: str, dtype: torch.dtype) -> torch.dtype:
    """What partial down-projections are rounded to, for x of a 16-bit dtype."""
    return dtype if operand == "fp8" else torch.float32


def sums_partials(operand: str, splits: int, rank: int) -> bool:
    """Whether :func:`prepare` sums up the partial down-projections; else the GEMM does that."""
    return rank > 0 and splits > 1 and operand != "none"


def check_modulation(x, input_scale, operand, mean, deviation, gain, shift) -> None:
    """Raises ValueError unless the modulation of :func:`prepare` fits its other arguments."""
    m, k = x.shape
    if operand in TOKEN_RANGE and input_scale is None:
        raise ValueError("a scale per token is found before x is modulated")
    if mean.numel() != m or deviation.numel() != m or mean.dtype != torch.float32 or deviation.dtype != torch.float32:
        raise ValueError(f"mean and deviation need {m} float32 values each")
    if gain.numel() != k or shift.numel() != k:
        raise ValueError(f"gain and shift have {gain.numel()} and {shift.numel()} values, need {k}")


def check(x, pre_quant_scale, input_scale, lora_down, operand) -> None:
    """Raises ValueError unless the arguments of :func:`prepare` fit together."""
    k = x.shape[1]
    if operand not in OPERANDS:
        raise ValueError(f"operand={operand!r}, needs one of {OPERANDS}")
    if x.dtype not in (torch.bfloat16, torch.float16) and not (x.dtype == torch.float32 and lora_down is None):
        raise ValueError(f"x is {x.dtype}, needs bfloat16 or float16, or float32 without lora_down")
    if k % GROUP:
        raise ValueError(f"x has {k} columns, needs a multiple of {GROUP}")
    check_scales(k, pre_quant_scale, input_scale)
    if lora_down is not None and (lora_down.shape[1:] != (k,) or lora_down.dtype != x.dtype):
        raise ValueError(f"lora_down is {lora_down.dtype} {tuple(lora_down.shape)}, needs {x.dtype} (R, {k})")


def check_scales(k, pre_quant_scale, input_scale) -> None:
    """Raises ValueError unless s has K values and t is one float32; None fits."""
    if pre_quant_scale is not None and tuple(pre_quant_scale.shape) != (k,):
        raise ValueError(f"pre_quant_scale is {tuple(pre_quant_scale.shape)}, needs ({k},)")
    if input_scale is not None and (input_scale.dtype != torch.float32 or input_scale.numel() != 1):
        raise ValueError(f"input_scale is {input_scale.dtype}, {input_scale.numel()} values, needs one float32")
