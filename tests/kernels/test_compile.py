"""Every kernel compiles for every GPU generation: no spills, no flushed subnormals, no FP8 hardware."""

import pathlib
import re
import subprocess

import pytest

triton = pytest.importorskip("triton")

from svdq_kernels import activation, expand, fp4  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

SHARED_MEMORY_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Most shared memory a program may have, by compute capability (CUDA C++ Programming Guide)."""

ACTIVATION_DTYPES = ("bf16", "fp16", "fp32")


def activation_signature(dtype, smooth, **more):
    signature = {"x_ptr": f"*{dtype}", "t_ptr": "*fp32", "K": "i32", "stride_xm": "i64", **more}
    return {**signature, "s_ptr": f"*{dtype}"} if smooth else signature


def cases():
    """Name -> (kernel, types of its arguments, constants); arguments in neither are None."""
    tile = {"GROUP": fp4.GROUP, "BLOCK_G": expand.BLOCK_G}
    types = {"qweight_ptr": "*u8", "scale_ptr": "*u8", "out_ptr": "*bf16", "num_groups": "i32"}
    result = {"expand": (expand._expand_kernel, types, tile, expand.NUM_WARPS)}
    block = {"BLOCK_K": activation.BLOCK_K}
    for dtype in ACTIVATION_DTYPES:
        for smooth in (False, True):
            name = f"{dtype}-{'smooth' if smooth else 'plain'}"
            types = activation_signature(dtype, smooth)
            result[f"token_scale-{name}"] = (activation._token_scale_kernel, types, block, 4)
            constants = {"GROUP": fp4.GROUP, **block}
            types = activation_signature(dtype, smooth, q_ptr="*bf16", stride_tm="i32")
            if smooth:
                types["h_ptr"] = f"*{dtype}"
            result[f"quantize-{name}"] = (activation._quantize_kernel, types, constants, 4)
    return result


def compile_for(capability, kernel, types, constants, num_warps):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {name: constants.get(name) for name in names if name not in types}
    # What a launch finds out about aligned tensors.
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in ("K", "stride_xm")]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


@pytest.mark.parametrize("capability", SHARED_MEMORY_BYTES)
@pytest.mark.parametrize("case", cases())
def test_compiles(case, capability, tmp_path):
    compiled = compile_for(capability, *cases()[case])
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability]
    assert ".ftz" not in ptx
    assert "div.full" not in ptx
    assert "div.approx" not in ptx
    assert "e4m3" not in ptx
    # A warp moves whole vectors.
    assert "st.global.v4.b32" in ptx or case.startswith("token_scale")

    cuobjdump = pathlib.Path(triton.backends.__file__).parent / "nvidia" / "bin" / "cuobjdump"
    if not cuobjdump.exists():
        pytest.skip("Triton has no cuobjdump to report spills")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [str(cuobjdump), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"], usage


@pytest.mark.parametrize("case", [name for name in cases() if name.startswith("quantize")])
def test_divisions_are_rounded_to_nearest(case):
    ptx = compile_for(90, *cases()[case]).asm["ptx"]
    # 1024 values over 128 threads: 8 quotients a thread, and one per block scale.
    assert ptx.count("div.rn.f32") >= 9
