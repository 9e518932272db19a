"""Packed NVFP4 products: the machine code, which is all a machine without such a GPU can see of them."""

import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from svdq_kernels import blockscaled, packed  # noqa: E402
from svdq_kernels.fp4 import GROUP  # noqa: E402

from svdq_compile.testing import ptx as machine  # noqa: E402

NATIVE_INSTRUCTION = {
    # Newer Triton spells scale_vec::4X as block16.
    10: r"tcgen05\.mma\.cta_group::1\.kind::mxf4nvf4\.block_scale\.(?:scale_vec::4X|block16)",
    12: r"mma\.sync\.aligned\.m16n8k64\.row\.col\.kind::mxf4nvf4\.block_scale\.scale_vec::4X"
    r"\.f32\.e2m1\.e2m1\.f32\.ue4m3",
}
ANY_PRODUCT = r"(?:tcgen05\.mma|mma\.sync|wgmma\.mma_async)[\w.:]*"
SIXTEEN_BIT = r"kind::f16|\.bf16\.bf16|\.f16\.f16"
SHARED_MEMORY_BYTES = {
    **machine.SHARED_MEMORY_BYTES,
    (8, 9): 99 << 10,
    (10, 3): machine.SHARED_MEMORY_BYTES[10, 0],
    (12, 1): machine.SHARED_MEMORY_BYTES[12, 0],
}
DECODING = ((8, 0), (8, 9), (9, 0), (12, 1))
# Rank, and whether K is a multiple of the tile's.
SHAPES = ((0, True), (32, True), (32, False), (128, True), (128, False))


def multiply_types(rank, scale_type="*u8", out_type="*bf16"):
    types = {
        "x_ptr": "*u8",
        "xs_ptr": scale_type,
        "w_ptr": "*u8",
        "ws_ptr": scale_type,
        "i_ptr": "*fp32",
        "t_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "out_ptr": out_type,
    }
    integers = ("M", "N", "K", "R", "SPLITS", "stride_xm", "stride_xsm", "stride_wn", "stride_wsn")
    types.update(dict.fromkeys(integers, "i32"))
    return {**types, "h_ptr": "*fp32", "l1_ptr": "*bf16"} if rank else types


def compile_multiply(capability, rank, *, native, per_token=False, even=True, aligned=True, **types):
    """The kernel as multiply_nvfp4 launches it."""
    tile = blockscaled.NATIVE_TILES[capability] if native else blockscaled.DECODED_TILE
    block_m, block_n, block_k, num_warps, num_stages = tile
    constants = {
        "GROUP": GROUP,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": blockscaled.block_r(rank),
        "GROUP_M": blockscaled.GROUP_M,
        "EVEN_K": even,
        "PER_TOKEN": per_token,
        "NATIVE": native,
    }
    return machine.compile_for(
        capability,
        blockscaled._multiply_kernel,
        multiply_types(rank, **types),
        constants,
        num_warps,
        num_stages,
        aligned=("K", "N", "R", "stride_xm", "stride_xsm", "stride_wn", "stride_wsn") if aligned else ("K",),
    )


def check_resources(compiled, capability, programs=1):
    """Memory a multiprocessor has, and no spilled registers."""
    # CUDA itself takes 1 KiB of each program.
    total = SHARED_MEMORY_BYTES[capability] + 1024
    assert programs * (compiled.metadata.shared + 1024) <= total
    if not machine.CUOBJDUMP.exists():
        pytest.skip("Triton has no cuobjdump to report spills")
    assert machine.spills(compiled) == 0


def registers(compiled, folder):
    """Registers of a thread."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(machine.CUOBJDUMP), "--dump-resource-usage", str(folder / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(map(int, re.findall(r"REG:(\d+)", usage)))


def products(compiled):
    """Tensor-core instructions as a list: block-scaled ones, and all others."""
    found = re.findall(ANY_PRODUCT, compiled.asm["ptx"])
    native = [name for name in found if re.fullmatch("|".join(NATIVE_INSTRUCTION.values()), name)]
    return native, [name for name in found if name not in native]


def check_native(compiled, major, rank):
    """Every product is block-scaled but the low-rank one, which is 16 bits wide as an emulated one would be."""
    native, others = products(compiled)
    assert native
    assert all(re.fullmatch(NATIVE_INSTRUCTION[major], name) for name in native)
    assert bool(others) == bool(rank)
    assert all(re.search(SIXTEEN_BIT, name) for name in others)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(("rank", "even"), SHAPES)
@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_multiplies_natively(capability, rank, per_token, even, tmp_path):
    compiled = compile_multiply(capability, rank, native=True, per_token=per_token, even=even)
    major = capability[0]
    check_native(compiled, major, rank)
    check_resources(compiled, capability, programs=2 if major == 10 else 1)
    if major == 10:
        # What lets two programs share a multiprocessor.
        assert registers(compiled, tmp_path) <= 128
        assert compiled.metadata.tmem_size <= 256


@pytest.mark.parametrize("out_type", ["*bf16", "*fp16", "*fp32"])
@pytest.mark.parametrize("capability", blockscaled.NATIVE_TILES)
def test_every_output_and_scales_typed_as_e4m3(capability, out_type):
    compiled = compile_multiply(capability, 32, native=True, scale_type="*fp8e4nv", out_type=out_type)
    check_native(compiled, capability[0], 32)
    check_resources(compiled, capability)


@pytest.mark.parametrize("rank", [0, 7])
@pytest.mark.parametrize("capability", [(10, 0), (12, 0)])
def test_odd_sizes_multiply_natively(capability, rank):
    compiled = compile_multiply(capability, rank, native=True, even=False, aligned=False)
    check_native(compiled, capability[0], rank)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability]


@pytest.mark.parametrize("capability", blockscaled.NATIVE_TILES)
def test_main_loop_loads_whole_vectors(capability):
    ptx = compile_multiply(capability, 0, native=True).asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x([0-9a-f]+)", ptx)
    assert min(int(size, 16) for size in copies) >= 4
    assert sum(size == "10" for size in copies) >= 4
    assert "st.global.v4.b32" in ptx


@pytest.mark.parametrize(("rank", "even"), [(0, True), (128, False)])
@pytest.mark.parametrize("capability", DECODING)
def test_decodes_elsewhere(capability, rank, even):
    compiled = compile_multiply(capability, rank, native=False, per_token=not even, even=even)
    native, others = products(compiled)
    assert not native
    assert others
    assert "e4m3" not in compiled.asm["ptx"]
    assert ".ftz" not in compiled.asm["ptx"]
    check_resources(compiled, capability)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("dtype", "smooth"), [("bf16", True), ("fp16", False), ("fp32", True)])
@pytest.mark.parametrize("capability", machine.SHARED_MEMORY_BYTES)
def test_quantize_compiles(capability, dtype, smooth, dynamic):
    types = {"x_ptr": f"*{dtype}", "t_ptr": "*fp32", "q_ptr": "*u8", "scale_ptr": "*u8"}
    types.update({"K": "i32", "SPAN": "i32", "stride_xm": "i64"})
    if smooth:
        types["s_ptr"] = f"*{dtype}"
    constants = {"DYNAMIC": dynamic, "GROUP": GROUP, "BLOCK_K": packed.BLOCK_K}
    kernel = packed._quantize_packed_kernel
    compiled = machine.compile_for(capability, kernel, types, constants, aligned=("K", "SPAN", "stride_xm"))
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\.ftz|div\.full|div\.approx|e4m3", ptx)
    # 1024 values over 128 threads: 8 quotients a thread, and one per block scale.
    assert ptx.count("div.rn.f32") >= 9
    check_resources(compiled, capability)
