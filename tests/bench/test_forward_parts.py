"""Kernels by name: which part of a forward they are, and what a trace sums up to."""

import pytest

from svdq_compile.bench.forward_parts import (
    ATTENTION,
    LINEARS,
    PARTS,
    QUANTISE,
    REST,
    breakdown,
    own_kernels,
    part_of,
)

NAMES = {
    "triton_tem_fused_linear_silu_1": LINEARS,
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNT": LINEARS,
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>": LINEARS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": LINEARS,
    "_gelu_quantize_kernel_4": LINEARS,
    "_heads_kernel_7": LINEARS,
    "_residual_kernel_8": LINEARS,
    "_dense_kernel": LINEARS,
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": ATTENTION,
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>": ATTENTION,
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention)": ATTENTION,
    "_prepare_kernel_0": QUANTISE,
    "_expand_kernel": QUANTISE,
    "_few_kernel_1": QUANTISE,
    "_sum_kernel_3": QUANTISE,
    "_token_scale_kernel_2": QUANTISE,
    "triton_red_fused__scaled_mm__to_copy_abs_amax_clamp_div_mul_7": QUANTISE,
    # Its operators are named for what it feeds.
    "triton_poi_fused__scaled_dot_product_cudnn_attention__to_copy_cat_clone_permute_view_5": REST,
    "triton_per_fused__to_copy_add_linear_mean_mul_pow_rsqrt_view_view_as_complex_5": REST,
    "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl_nocast<": REST,
    "Memset (Device)": REST,
    "Memcpy DtoD (Device -> Device)": REST,
}


@pytest.mark.parametrize("name", NAMES)
def test_parts(name):
    assert part_of(name) == NAMES[name]


def test_every_kernel_of_ours_is_a_part_of_a_linear():
    assert {"_prepare_kernel", "_expand_kernel", "_dense_kernel", "_gemv_kernel"} <= own_kernels().keys()
    assert {part_of(f"{name}_3") for name in own_kernels()} == {LINEARS, QUANTISE}


def test_a_trace_sums_up():
    events = [
        {"cat": "kernel", "name": "_prepare_kernel_0", "dur": 1500},
        {"cat": "kernel", "name": "nvjet_sm90", "dur": 250.5},
        {"cat": "kernel", "name": "_prepare_kernel_0", "dur": 500},
        {"cat": "gpu_memset", "name": "Memset (Device)", "dur": 2},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9000},
        {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region", "dur": 9000},
        {"ph": "M", "name": "process_name"},
    ]
    found = breakdown(events)
    assert [(k.name, k.launches) for k in found.kernels] == [
        ("_prepare_kernel_0", 2),
        ("nvjet_sm90", 1),
        ("Memset (Device)", 1),
    ]
    assert found.launches == 4
    assert found.ms(QUANTISE) == pytest.approx(2.0)
    assert found.ms(LINEARS) == pytest.approx(0.2505)
    assert sum(found.ms(part) for part in PARTS) == pytest.approx(found.total)
    lines = found.text(2, blocks=2).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == ["1000.0", "1.00", "quantise", "_prepare_kernel_0"]
