"""Every kernel compiles for every GPU generation: its tensor core instruction, no spills, room in shared memory."""

import re

import pytest

pytest.importorskip("triton")

from svdq_kernels import activation, dense, expand, few, gemv, modulation

from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, compile_for, spills

CAPABILITIES = tuple(SHARED_MEMORY_BYTES)
E4M3_SINCE = (8, 9)

# What a launch finds out about aligned tensors.
ALIGNED = ("N", "K", "K0", "K1", "W", "stride_xm", "stride_wn", "stride_x0m", "stride_x1m")

MMA = {(8, 0): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma", (12, 0): "mma.sync"}
"""The widest tensor core instruction of each generation."""


def sm(capability):
    return f"sm_{capability[0]}{capability[1]}"


def compiled(capability, kernel, types, constants, **options):
    result = compile_for(capability, kernel, types, constants, **options, aligned=ALIGNED)
    assert result.metadata.shared <= SHARED_MEMORY_BYTES[capability]
    if CUOBJDUMP.exists():
        assert spills(result) == 0
    return result.asm["ptx"]


def prepare(capability, operand, m, rank, dtype="bf16", smooth=True):
    constants = activation.configuration(m, 3072, rank, operand)
    warps = constants.pop("num_warps")
    types = {"x_ptr": f"*{dtype}", "t_ptr": "*fp32", "M": "i32", "K": "i32", "R": "i32", "stride_xm": "i64"}
    types |= {"stride_tm": "i32", "operand_ptr": "*fp8e4nv" if operand == "fp8" else f"*{dtype}"}
    types |= {"s_ptr": f"*{dtype}"} if smooth else {}
    types |= {"down_ptr": f"*{dtype}", "partials_ptr": f"*{dtype}" if operand == "fp8" else "*fp32"} if rank else {}
    constants |= {"OPERAND": operand, "SCALE_FACTOR": 6.0, "RANK": activation.padded_rank(rank)}
    constants |= {"WGMMA": activation.uses_wgmma(capability)}
    return compiled(capability, activation._prepare_kernel, types, constants, num_warps=warps)


def gemm(capability, dtype, config, rank=32, per_token=False, bias=True, splits=1):
    constants = dict(config)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    tma = dense.uses_tma(capability)
    types = {"scale_a_ptr": "*fp32", "scale_b_ptr": "*fp32", "out_ptr": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    types |= {"stride_xm": "i64", "stride_wn": "i64"}
    types |= {"bias_ptr": "*bf16"} if bias else {}
    types |= {"partials_ptr": "*bf16" if splits == 1 else "*fp32", "up_ptr": "*bf16"} if rank else {}
    for name, rows in (("x", constants["BLOCK_M"]), ("w", constants["BLOCK_N"])):
        types[name] = f"tensordesc<{dtype}[{rows}, {constants['BLOCK_K']}]>" if tma else f"*{dtype}"
    constants |= {"PER_TOKEN": per_token, "FACTOR_A": 6.0, "FACTOR_B": 8.0, "R": rank, "SPLITS": splits, "TMA": tma}
    constants |= {"CHUNK": dense.rank_chunk(rank), "PARTS": dense.column_parts_of(constants["BLOCK_N"])}
    return compiled(capability, dense._dense_kernel, types, constants, **options)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("m", [16, 4096])
@pytest.mark.parametrize("operand", ["none", "plain", "nvfp4", "fp8"])
def test_prepare(capability, operand, m):
    if operand == "fp8" and capability < E4M3_SINCE:
        pytest.skip("no e4m3 below sm_89")
    ptx = prepare(capability, operand, m, 32)
    # 16 and 32 tokens are too few for the wider instructions.
    assert (MMA[capability] if m == 4096 else "mma.sync") in ptx
    if operand == "nvfp4":
        # One ulp decides a tie, so nothing may be flushed or approximated.
        assert "div.rn.f32" in ptx
        assert not any(text in ptx for text in (".ftz", "div.full", "div.approx", "e4m3"))
    if operand == "fp8":
        assert "cvt.rn.satfinite.e4m3x2" in ptx


@pytest.mark.parametrize("smooth", [False, True])
def test_a_projection_is_complete_before_its_x_is_overwritten(smooth):
    """x is read as an operand as well, so Triton gives it no buffer for a product that is still under way."""
    waits = re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", prepare((9, 0), "fp8", 4096, 32, smooth=smooth))
    assert set(waits) == {"0"}


@pytest.mark.parametrize("rank", [0, 16, 48, 128, 256])
@pytest.mark.parametrize("m", [16, 600, 4096])
def test_prepare_ranks(rank, m):
    ptx = prepare((9, 0), "fp8", m, rank, dtype="fp16", smooth=rank != 16)
    assert ("mma" in ptx) == bool(rank)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("m", [600, 4096])
def test_the_largest_rank_fits_the_registers(capability, m):
    assert "div.rn.f32" in prepare(capability, "nvfp4", m, 256)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("k", [64, 3072, 12288])
@pytest.mark.parametrize("operand", ["none", "plain", "nvfp4", "fp8"])
def test_few_tokens_activation(capability, operand, k):
    if operand == "fp8" and capability < E4M3_SINCE:
        pytest.skip("no e4m3 below sm_89")
    constants = few.configuration(k, 32) | {"K": k, "OPERAND": operand, "SCALE_FACTOR": 6.0}
    warps = constants.pop("num_warps")
    types = {"x_ptr": "*bf16", "s_ptr": "*bf16", "t_ptr": "*fp32", "down_ptr": "*bf16", "h_ptr": "*bf16", "R": "i32"}
    types |= {"stride_xm": "i64", "stride_tm": "i32"}
    if operand != "none":
        types["operand_ptr"] = "*fp8e4nv" if operand == "fp8" else "*bf16"
    ptx = compiled(capability, few._few_kernel, types, constants, num_warps=warps)
    assert "mma" not in ptx
    assert ("cvt.rn.satfinite.e4m3x2" in ptx) == (operand == "fp8")


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("k", [64, 3072, 15360])
@pytest.mark.parametrize("rank", [0, 32])
def test_modulation(capability, rank, k):
    constants = modulation.configuration(k) | {"R0": rank, "R1": 0, "EPS0": 1e-6, "EPS1": 1e-6, "TWO": True}
    constants |= {"SLICE0": 448, "SLICE1": 128} | {f"SLICES{i}": modulation.slices((448, 128)[i]) for i in range(2)}
    warps = constants.pop("num_warps")
    types = dict.fromkeys(("M0", "K0", "K1"), "i32") | dict.fromkeys(("stride_x0m", "stride_x1m"), "i64")
    for i in range(2):
        types |= dict.fromkeys((f"x{i}_ptr", f"gain{i}_ptr", f"shift{i}_ptr"), "*bf16")
        types |= dict.fromkeys((f"mean{i}_ptr", f"deviation{i}_ptr"), "*fp32")
    if rank:
        types |= dict.fromkeys(("s0_ptr", "down0_ptr", "modulated0_ptr"), "*bf16") | {"sums0_ptr": "*fp32"}
    assert "rsqrt" in compiled(capability, modulation._modulation_kernel, types, constants, num_warps=warps)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("smooth", [False, True])
def test_token_scale(capability, smooth):
    types = {
        "x_ptr": "*bf16",
        "t_ptr": "*fp32",
        "K": "i32",
        "stride_xm": "i64",
        **({"s_ptr": "*bf16"} if smooth else {}),
    }
    constants = {"TOKEN_RANGE": 448.0, "BLOCK_K": activation.TOKEN_SCALE_BLOCK}
    assert "div.rn.f32" in compiled(capability, activation._token_scale_kernel, types, constants)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8e4nv"])
def test_expand(capability, dtype):
    if dtype == "fp8e4nv" and capability < E4M3_SINCE:
        pytest.skip("no e4m3 below sm_89")
    scale = "*fp8e4nv" if capability >= E4M3_SINCE else "*u8"
    kinds = ([kind] * expand.MAX_MEMBERS for kind in ("*u8", scale, f"*{dtype}", "i32"))
    types = expand.arguments(*kinds)
    constants = {"MEMBERS": types.pop("MEMBERS"), "GROUP": expand.GROUP, "BLOCK_G": expand.BLOCK_G}
    constants["DIVISOR"] = 8.0 if dtype == "fp8e4nv" else 1.0
    ptx = compiled(capability, expand._expand_kernel, types, constants, num_warps=expand.NUM_WARPS)
    # A warp moves whole vectors.
    assert "st.global.v4.b32" in ptx
    if dtype == "fp8e4nv":
        # A block's eight magnitudes are rounded, not its 16 values.
        blocks = expand.MAX_MEMBERS * expand.BLOCK_G // (32 * expand.NUM_WARPS)
        assert ptx.count("cvt.rn.satfinite.e4m3x2.f16x2") == 4 * blocks


def tiles(capability, element_size):
    return [
        pytest.param(capability, element_size, config, id=f"{sm(capability)}-{8 * element_size}bit-{i}")
        for i, config in enumerate(dense.configurations(4096, 3072, element_size, capability))
    ]


@pytest.mark.parametrize(
    ("capability", "element_size", "config"),
    [tile for c in CAPABILITIES for size in (1, 2) if size == 2 or c >= E4M3_SINCE for tile in tiles(c, size)],
)
def test_dense(capability, element_size, config):
    ptx = gemm(capability, "fp8e4nv" if element_size == 1 else "bf16", config)
    assert MMA[capability] in ptx
    if element_size == 1:
        assert ("kind::f8f6f4" if capability == (10, 0) else "e4m3") in ptx
    if capability == (9, 0):
        wanted = "f32.e4m3.e4m3" if element_size == 1 else "f32.bf16.bf16"
        assert any("wgmma.mma_async" in line and wanted in line for line in ptx.splitlines())
        assert "cp.async.bulk.tensor" in ptx


@pytest.mark.parametrize("rank", [0, 16, 48, 128, 256])
@pytest.mark.parametrize(("per_token", "splits"), [(False, 1), (True, 2)])
@pytest.mark.parametrize(("dtype", "config"), [p.values[1:] for size in (1, 2) for p in tiles((9, 0), size)])
def test_dense_ranks(dtype, config, rank, per_token, splits):
    dtype = "fp8e4nv" if dtype == 1 else "bf16"
    ptx = gemm((9, 0), dtype, config, rank, per_token, bias=not per_token, splits=splits)
    assert "wgmma" in ptx


@pytest.mark.parametrize("dtype", ["fp8e4nv", "bf16"])
def test_nothing_waits_for_the_low_rank_branch_before_the_main_loop(dtype):
    config = dense.configurations(4096, 3072, 1 if dtype == "fp8e4nv" else 2, (9, 0))[0]
    ptx = gemm((9, 0), dtype, config, 32)
    ahead = ptx[: ptx.index("cp.async.bulk.tensor")]
    # Behind the stores of the tile before: the loads of h and L1, and no copy of them to shared memory yet.
    ahead = ahead[ahead.rindex("st.global") :]
    assert "ld.global" in ahead
    assert "st.shared" not in ahead


def few_tokens(capability, tokens, shape, dtype="bf16", rank=32):
    constants = gemv.configuration(tokens, *shape)
    warps = constants.pop("num_warps")
    scale = "*fp8e4nv" if capability >= E4M3_SINCE else "*u8"
    types = {"x_ptr": f"*{dtype}", "words_ptr": "*i32", "block_scale_ptr": scale, "scale_b_ptr": "*fp32"}
    types |= {"out_ptr": f"*{dtype}", "scale_a_ptr": "*fp32", "bias_ptr": f"*{dtype}", "M": "i32", "N": "i32"}
    types |= {"partials_ptr": "*fp32", "up_ptr": f"*{dtype}"} if rank else {}
    constants |= {"K": shape[1], "PER_TOKEN": tokens > 1, "R": rank, "FACTOR": 128.0}
    result = compile_for(capability, gemv._gemv_kernel, types, constants, num_warps=warps, num_stages=1, aligned=("N",))
    assert result.metadata.shared <= SHARED_MEMORY_BYTES[capability]
    if CUOBJDUMP.exists():
        assert spills(result) == 0
    return result.asm


@pytest.mark.parametrize("capability", CAPABILITIES, ids=sm)
@pytest.mark.parametrize("shape", [(3072, 3072), (18432, 3072), (3072, 12288), (80, 1024)])
@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens(capability, tokens, shape):
    asm = few_tokens(capability, tokens, shape)
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in asm["ptx"]
    # 16 bytes of codes a thread and load.
    assert "ld.global.v4.b32" in asm["ptx"]


@pytest.mark.parametrize("rank", [0, 5, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_few_tokens_ranks(rank, dtype):
    assert "mma.sync" in few_tokens((9, 0), 16, (3072, 3072), dtype, rank)["ptx"]


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("n", [3072, 18432])
def test_codes_are_decoded_in_the_registers_they_are_loaded_to(n, tokens):
    ir = few_tokens((9, 0), tokens, (n, 3072), rank=0)["ptx"]
    loop = ir[ir.index("mma.sync") : ir.rindex("mma.sync")]
    # What crosses threads goes through shared memory or shuffles.
    assert not any(text in loop for text in ("st.shared", "ld.shared", "shfl.sync", "bar.sync"))
