"""The code Inductor generates for linears that share their activation."""

import pytest
import torch
from torch import nn

from svdq_compile.model.share import mark_shared
from svdq_compile.spec import Format
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.weights import random_linear, share_activation

MMA = {(8, 0): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma", (12, 0): "mma.sync"}


class Projections(nn.Module):
    """to_q, to_k and to_v of unequal widths, each with a sum behind it."""

    def __init__(self, mode, share=True, in_features=128, **options):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            random_linear(n, in_features, compute=mode, **options) for n in (512, 384, 80)
        )
        if share:
            share_activation(self.to_q, self.to_k, self.to_v)
        mark_shared({name: module.weight for name, module in self.named_children()})

    def forward(self, x):
        return self.to_q(x) + 1, self.to_k(x) + 1, self.to_v(x) + 1


def generate(module, tokens=600, capability=(9, 0), dtype=torch.bfloat16, **options):
    with fake_gpu(capability):
        x = torch.randn(1, tokens, module.to_q.in_features, dtype=dtype)
        return compile_on_fake_gpu(module, (x,), **options)


def stems(code):
    """Launches of our kernels, without the numbers and operator names Inductor appends."""
    names = ["triton_tem" if name.startswith("triton_tem") else name.rpartition("_")[0] for name in launches(code)]
    return [name for name in names if not name.startswith("triton_poi")]


def template(code):
    (kernel,) = (kernel for kernel in kernels(code) if kernel.name.startswith("triton_tem"))
    return kernel


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("capability", "mode", "expected"),
    [
        ((8, 0), "bf16", ["_prepare_kernel", "_expand_kernel", "triton_tem"]),
        ((8, 0), "nvfp4", ["_prepare_kernel", "_expand_kernel", "triton_tem"]),
        ((9, 0), "fp8", ["_prepare_kernel", "_expand_kernel", "triton_tem"]),
        ((9, 0), "nvfp4", ["_prepare_kernel", "_expand_kernel", "triton_tem"]),
        ((10, 0), "nvfp4", ["_quantize_packed_kernel", "_prepare_kernel", "triton_tem"]),
        ((12, 0), "auto", ["_quantize_packed_kernel", "_prepare_kernel", "triton_tem"]),
    ],
)
def test_one_activation_kernel_and_one_gemm(capability, mode, expected, dynamic):
    code = generate(Projections(mode), capability=capability, dynamic=dynamic)
    assert stems(code) == expected
    kernel = template(code)
    (compiled,) = compile_kernel(kernel.source, kernel.name, capability)
    assert MMA[capability] in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability]
    if CUOBJDUMP.exists():
        assert spills(compiled) == 0


@pytest.mark.parametrize(("mode", "in_features"), [("fp8", 128), ("bf16", 64)])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(mode, in_features):
    kernel = template(generate(Projections(mode, in_features=in_features), tokens=4096))
    (compiled,) = compile_kernel(kernel.source, kernel.name, (9, 0))
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


@pytest.mark.parametrize(("tokens", "dynamic"), [(1, False), (3, True)])
@pytest.mark.parametrize("mode", ["fp8", "nvfp4", "bf16"])
def test_few_tokens_are_one_activation_kernel_and_one_read_of_all_weights(mode, tokens, dynamic):
    code = generate(Projections(mode), tokens=tokens, dynamic=dynamic)
    assert stems(code) == ["_few_kernel", "triton_tem"]
    kernel = template(code)
    (compiled,) = compile_kernel(kernel.source, kernel.name, (9, 0))
    if CUOBJDUMP.exists():
        assert spills(compiled) == 0


def test_unpacking_as_generated_compiles():
    """PTX in its functions included."""
    code = generate(Projections("fp8"))
    (kernel,) = (kernel for kernel in kernels(code) if kernel.name.startswith("_expand_kernel"))
    (compiled,) = compile_kernel(kernel.source, "_expand_kernel", (9, 0))
    assert "prmt.b32" in compiled.asm["ptx"]
    # No data crosses threads.
    assert compiled.metadata.shared == 0


def test_expanded_weights():
    code = generate(Projections("fp8", format=Format.FP8_SVD))
    assert stems(code) == ["_prepare_kernel", "triton_tem"]


@pytest.mark.parametrize("options", [{"format": Format.NVFP4}, {"bias": False}, {"dynamic": True}], ids=str)
def test_absent_parts(options):
    code = generate(Projections("fp8", **options))
    assert [name for name in stems(code) if name != "_token_scale_kernel"] == [
        "_prepare_kernel",
        "_expand_kernel",
        "triton_tem",
    ]
    kernel = template(code)
    assert compile_kernel(kernel.source, kernel.name, (9, 0))


def test_what_does_not_share_stays_apart():
    code = generate(Projections("fp8", share=False))
    assert stems(code) == 3 * ["_prepare_kernel", "_expand_kernel", "triton_tem"]


def test_skipping_the_pass():
    code = generate(Projections("fp8"), options={"skip_passes": "share_inputs"})
    assert stems(code) == 3 * ["_prepare_kernel", "_expand_kernel", "triton_tem"]


@pytest.mark.parametrize(("mode", "dtype"), [("modelopt", torch.bfloat16), ("fp8", torch.float32)])
def test_what_no_kernel_takes_stays_the_operator(mode, dtype):
    assert "torch.ops.svdq.linear_group.default" in launches(generate(Projections(mode), dtype=dtype))


class Modulations(nn.Module):
    """The modulations of several blocks, which all read the time embedding."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Sequential(nn.SiLU(), self.linear()) for name in ("img_mod", "txt_mod")})
            for _ in range(blocks)
        )
        mark_shared({name: m.weight for name, m in self.named_modules() if isinstance(m, nn.Linear)})

    def linear(self):
        return random_linear(384, 256, format=Format.NVFP4, compute="fp8")

    def forward(self, temb):
        return [part(temb) + 1 for block in self.blocks for part in block.values()]


@pytest.mark.parametrize(("blocks", "groups"), [(1, 1), (2, 1), (5, 3)])
def test_modulations_are_read_four_at_a_launch(blocks, groups):
    with fake_gpu((9, 0)):
        code = compile_on_fake_gpu(Modulations(blocks), (torch.randn(1, 256, dtype=torch.bfloat16),), fullgraph=True)
    assert stems(code).count("triton_tem") == groups
    assert stems(code).count("_prepare_kernel") <= groups
