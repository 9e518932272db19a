"""What an activation kernel needs to normalise and modulate x as it reads it, of two streams by one launch.

    mean, deviation = moments of each row of x; deviation is the reciprocal of the standard deviation
    D = round(L2 * s * (1 + gain))          sums = [sum of D, sum of s * L2 * shift], of each rank over a slice of K

With them ``h = ((x - mean) * deviation * (1 + gain) + shift) * s @ L2.T`` takes x as it lies in memory. Of each slice:

    h = (x @ D.T - mean * sums[0]) * deviation + sums[1]
"""

import torch
import triton
import triton.language as tl


@triton.jit
def find_moments(row, x_ptr, mean_ptr, deviation_ptr, K, stride_xm, EPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and deviation of one row, the variance about the mean: both are in registers by then.

    Args:
        x_ptr: x [M, K], unit column stride.
        mean_ptr, deviation_ptr: float32 [M].
        EPS: added to the variance.
        BLOCK_K: at least K.
    """
    offs_k = tl.arange(0, BLOCK_K)
    mask = offs_k < K
    x = tl.load(x_ptr + tl.cast(row, tl.int64) * stride_xm + offs_k, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / K
    centered = tl.where(mask, x - mean, 0.0)
    variance = tl.sum(centered * centered, 0) / K
    tl.store(mean_ptr + row, mean)
    tl.store(deviation_ptr + row, tl.rsqrt(variance + EPS))


@triton.jit
def modulate_down(
    program,
    down_ptr,
    s_ptr,
    gain_ptr,
    shift_ptr,
    modulated_ptr,
    sums_ptr,
    K,
    R: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Some slices of one rank of D, and their two sums.

    Args:
        program: which of the R ranks of which slices.
        down_ptr: L2 [R, K], contiguous.
        s_ptr, gain_ptr, shift_ptr: [K]; s_ptr may be None.
        modulated_ptr: D [R, K], L2's dtype.
        sums_ptr: float32 [ceil(K / SLICE), 2, R].
        SLICE: columns of a slice.
        SLICES: of a program.
    """
    rank = program % R
    parts = (program // R) * SLICES + tl.arange(0, SLICES)
    columns = tl.arange(0, triton.next_power_of_2(SLICE))
    offs_k = parts[:, None] * SLICE + columns[None, :]
    mask = (columns < SLICE)[None, :] & (offs_k < K)
    wide = tl.load(down_ptr + rank * K + offs_k, mask=mask, other=0.0).to(tl.float32)
    if s_ptr is not None:
        wide *= tl.load(s_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    gain = 1.0 + tl.load(gain_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    modulated = (wide * gain).to(modulated_ptr.dtype.element_ty)
    tl.store(modulated_ptr + rank * K + offs_k, modulated, mask=mask)
    where = sums_ptr + 2 * parts * R + rank
    # What was rounded, once for the product and for the sum.
    tl.store(where, tl.sum(modulated.to(tl.float32), 1), mask=parts * SLICE < K)
    tl.store(where + R, tl.sum(wide * shift, 1), mask=parts * SLICE < K)


@triton.jit
def down_programs(K, R: tl.constexpr, SLICE: tl.constexpr, SLICES: tl.constexpr):
    """Programs that make a stream's D."""
    return R * tl.cdiv(K, SLICE * SLICES)


@triton.jit
def modulate_stream(
    program,
    x_ptr,
    s_ptr,
    gain_ptr,
    shift_ptr,
    down_ptr,
    mean_ptr,
    deviation_ptr,
    modulated_ptr,
    sums_ptr,
    K,
    stride_xm,
    R: tl.constexpr,
    EPS: tl.constexpr,
    SLICE: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program's share of a stream: the first take slices of a rank each, the others a row; arguments as above."""
    of_down = down_programs(K, R, SLICE, SLICES)
    if program < of_down:
        if R > 0:
            own = (down_ptr, s_ptr, gain_ptr, shift_ptr, modulated_ptr, sums_ptr)
            modulate_down(program, *own, K, R, SLICE, SLICES)
    elif x_ptr is not None:
        find_moments(program - of_down, x_ptr, mean_ptr, deviation_ptr, K, stride_xm, EPS, BLOCK_K)


@triton.jit
def _modulation_kernel(
    x0_ptr,
    x1_ptr,
    s0_ptr,
    s1_ptr,
    gain0_ptr,
    gain1_ptr,
    shift0_ptr,
    shift1_ptr,
    down0_ptr,
    down1_ptr,
    mean0_ptr,
    mean1_ptr,
    deviation0_ptr,
    deviation1_ptr,
    modulated0_ptr,
    modulated1_ptr,
    sums0_ptr,
    sums1_ptr,
    M0,
    K0,
    K1,
    stride_x0m,
    stride_x1m,
    R0: tl.constexpr,
    R1: tl.constexpr,
    EPS0: tl.constexpr,
    EPS1: tl.constexpr,
    SLICE0: tl.constexpr,
    SLICE1: tl.constexpr,
    SLICES0: tl.constexpr,
    SLICES1: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Both streams, or the first; arguments as :func:`modulate_stream`'s with the stream's number.

    Args:
        x0_ptr, x1_ptr: None where only D is to be made; mean and deviation are None then.
        M0: rows of the first stream whose moments are to be found.
    """
    program = tl.program_id(0)
    of_first = down_programs(K0, R0, SLICE0, SLICES0) + M0
    if program < of_first:
        modulate_stream(
            program,
            x0_ptr,
            s0_ptr,
            gain0_ptr,
            shift0_ptr,
            down0_ptr,
            mean0_ptr,
            deviation0_ptr,
            modulated0_ptr,
            sums0_ptr,
            K0,
            stride_x0m,
            R0,
            EPS0,
            SLICE0,
            SLICES0,
            BLOCK_K,
        )
    elif TWO:
        modulate_stream(
            program - of_first,
            x1_ptr,
            s1_ptr,
            gain1_ptr,
            shift1_ptr,
            down1_ptr,
            mean1_ptr,
            deviation1_ptr,
            modulated1_ptr,
            sums1_ptr,
            K1,
            stride_x1m,
            R1,
            EPS1,
            SLICE1,
            SLICES1,
            BLOCK_K,
        )


STREAM = {
    "x{}_ptr": "x",
    "s{}_ptr": "s",
    "gain{}_ptr": "gain",
    "shift{}_ptr": "shift",
    "down{}_ptr": "down",
    "mean{}_ptr": "mean",
    "deviation{}_ptr": "deviation",
    "modulated{}_ptr": "modulated",
    "sums{}_ptr": "sums",
    "K{}": "k",
    "stride_x{}m": "stride",
    "R{}": "rank",
    "EPS{}": "eps",
    "SLICE{}": "slice",
}
"""The kernel's parameters -> what a stream calls them."""

STEP = 1024
"""Columns of L2 a program takes: few enough that it is done when those that find a row's moments are."""


def slices(columns: int) -> int:
    """How many slices of so many columns a program takes, a power of two."""
    return max(1, STEP // triton.next_power_of_2(columns))


def programs(streams: list[dict[str, object]], rows: list[object]) -> object:
    """Programs of a launch.

    Args:
        streams: as :func:`arguments` takes them.
        rows: of each, those whose moments are to be found.
    """
    of_down = (each["rank"] * triton.cdiv(each["k"], each["slice"] * slices(each["slice"])) for each in streams)
    return sum(rows) + sum(of_down)


def configuration(k: int) -> dict[str, int]:
    """Constants of the kernel, and ``num_warps``: a warp holds 1024 values of a row.

    Args:
        k: the most columns of a stream.
    """
    block_k = max(32, triton.next_power_of_2(k))
    return {"BLOCK_K": block_k, "num_warps": max(1, min(block_k // 1024, 8))}


def arguments(streams: list[dict[str, object]], rows: object) -> dict[str, object]:
    """What a launch takes of one or two streams, by the kernel's parameters' names; absent ones are None.

    Args:
        streams: of each the values of :data:`STREAM`; k, stride and eps of an x that is absent are any, and so is the
            slice of one without a low-rank branch.
        rows: rows of the first stream whose moments are to be found.
    """
    first, *others = streams
    second = others[0] if others else dict.fromkeys(STREAM.values()) | {"rank": 0, "eps": 0.0, "slice": 1}
    given = {name.format(i): each[own] for name, own in STREAM.items() for i, each in enumerate((first, second))}
    given |= {f"SLICES{i}": slices(each["slice"]) for i, each in enumerate((first, second))}
    return given | {"M0": rows, "TWO": bool(others)}


def modulate(
    x: list[torch.Tensor | None],
    pre_quant_scale: list[torch.Tensor | None],
    gain: list[torch.Tensor],
    shift: list[torch.Tensor],
    lora_down: list[torch.Tensor | None],
    eps: list[float],
    slice_columns: list[int],
) -> list[tuple[torch.Tensor | None, ...]]:
    """Moments of x, and L2 as it multiplies x, of one or two streams.

    Args:
        x: bfloat16 or float16 [M, K], unit column stride; None to leave out the moments.
        pre_quant_scale: s [K], or None for no smoothing.
        gain, shift: [K], contiguous.
        lora_down: L2 [R, K], contiguous, or None.
        eps: added to the variance.
        slice_columns: of a slice of K.

    Returns:
        Of each stream mean and deviation, float32 [M], or None; D, L2's dtype [R, K], and sums, float32
        [ceil(K / slice_columns), 2, R], or None.
    """
    streams, results = [], []
    given = zip(x, pre_quant_scale, gain, shift, lora_down, eps, slice_columns, strict=True)
    for x_i, s, g, shift_i, down, eps_i, columns in given:
        k, rank = g.numel(), 0 if down is None else down.shape[0]
        empty = {"dtype": torch.float32, "device": g.device}
        mean, deviation = (None, None) if x_i is None else (torch.empty(x_i.shape[0], **empty) for _ in range(2))
        size = (-(-k // columns), 2, rank)
        modulated, sums = (torch.empty_like(down), torch.empty(size, **empty)) if rank else (None, None)
        own = (x_i, s, g, shift_i, down if rank else None, mean, deviation, modulated, sums)
        stride = 0 if x_i is None else x_i.stride(0)
        streams.append(dict(zip(STREAM.values(), (*own, k, stride, rank, eps_i, columns), strict=True)))
        results.append((mean, deviation, modulated, sums))
    rows = [0 if each is None else each.shape[0] for each in x]
    count = programs(streams, rows)
    if count:
        with torch.cuda.device_of(gain[0]):
            config = configuration(max(each["k"] for each in streams))
            _modulation_kernel[(count,)](**arguments(streams, rows[0]), **config)
    return results
