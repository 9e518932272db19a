"""The code Inductor generates for linears of two streams and their residuals, on GPUs that need not be there."""

import pytest
import torch
from torch import nn

from svdq_compile.ops.joint_linear import joint_linear
from svdq_compile.spec import COMPONENTS, Format
from svdq_compile.testing.checkpoints import SMALL
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
HEADS, HEAD_DIM, IN_FEATURES, OUT_FEATURES = 2, 128, (256, 192), 320
CONFIG = SMALL | {
    "num_layers": 1,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "axes_dims_rope": [16, 56, 56],
}
OURS = ("_residual_kernel", "_expand_kernel", "_prepare_kernel", "_sum_kernel", "_token_scale_kernel")


class Block(nn.Module):
    """A transformer block of a recipe, with the arguments it has in the model."""

    def __init__(self, recipe):
        super().__init__()
        model = random_transformer(CONFIG, recipe=recipe, rank=16, blocks_kept=0, compute="fp8")
        self.block = model.transformer_blocks[0]

    def forward(self, image, text, temb, image_table, text_table):
        return self.block(image, text, None, temb, (image_table, text_table))


class Operator(nn.Module):
    """The operator itself; gates are chunks of one tensor, as a modulation makes them."""

    def __init__(self, formats=(Format.NVFP4_SVD, Format.NVFP4), compute="fp8", **options):
        super().__init__()
        self.compute = compute
        self.linears = nn.ModuleList(
            random_linear(OUT_FEATURES, k, format=format, **options)
            for k, format in zip(IN_FEATURES, formats, strict=True)
        )

    def forward(self, xs, residuals, modulation):
        parts = [[*(getattr(own.weight, name) for name in COMPONENTS), own.bias] for own in self.linears]
        gates = [each.unsqueeze(1) for each in modulation.chunk(2, dim=-1)]
        return joint_linear(xs, *parts, residuals, gates, self.compute)


def block_inputs(batch, image=150, text=130):
    width = HEADS * HEAD_DIM
    streams = torch.randn(batch, image, width).bfloat16(), torch.randn(batch, text, width).bfloat16()
    tables = [torch.view_as_complex(torch.randn(count, HEAD_DIM // 2, 2)) for count in (image, text)]
    return *streams, torch.randn(batch, width).bfloat16(), *tables


def operator_inputs(tokens=(150, 130), batch=2):
    xs = [torch.randn(batch, count, k).bfloat16() for count, k in zip(tokens, IN_FEATURES, strict=True)]
    residuals = [torch.randn(batch, count, OUT_FEATURES).bfloat16() for count in tokens]
    return xs, residuals, torch.randn(batch, 2 * OUT_FEATURES).bfloat16()


def generate(module, arguments, capability=(9, 0), **options):
    with fake_gpu(capability):
        return compile_on_fake_gpu(module, arguments, backend="svdq", fullgraph=True, **options)


def stem(name):
    return name.rstrip("0123456789").removesuffix("_")


@pytest.mark.parametrize("recipe", ["mixed", "all"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_block_writes_nothing_between_attention_and_its_residuals(recipe, batch, dynamic):
    names = [stem(name) for name in launches(generate(Block(recipe), block_inputs(batch), dynamic=dynamic))]
    # Behind attention, and of the feed-forward layers.
    assert names.count("_residual_kernel") == 2
    attention = next(i for i, name in enumerate(names) if "attention" in name)
    between = names[attention + 1 : names.index("_residual_kernel")]
    copies = [name for name in between if name not in OURS]
    # A batch's tokens of one stream do not lie behind one another in attention's result.
    assert len(copies) <= 2 * (batch - 1)
    assert between.count("_prepare_kernel") == 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "options", [{}, {"formats": 2 * (Format.FP8,)}, {"bias": False}, {"dynamic": True}, {"rank": 48}], ids=str
)
def test_one_kernel_for_both_streams(options, dynamic):
    code = generate(Operator(**options), operator_inputs(), dynamic=dynamic)
    names = [stem(name) for name in launches(code)]
    assert names.count("_residual_kernel") == 1
    assert set(names) <= set(OURS)
    (kernel,) = (kernel for kernel in kernels(code) if stem(kernel.name) == "_residual_kernel")
    (compiled,) = compile_kernel(kernel.source, "_residual_kernel", (9, 0))
    assert "e4m3.e4m3" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0]
    assert not CUOBJDUMP.exists() or spills(compiled) == 0


@pytest.mark.parametrize(
    ("compute", "capability", "tokens", "products"),
    [
        ("bf16", (9, 0), (150, 130), "triton_tem"),
        ("nvfp4", (9, 0), (150, 130), "triton_tem"),
        ("fp8", (10, 0), (150, 130), "triton_tem"),
        ("fp8", (9, 0), (150, 8), "triton_tem"),
        ("fp8", (8, 0), (150, 130), "torch.ops.svdq.linear.default"),
    ],
)
def test_what_one_kernel_does_not_compute_is_two_linears(compute, capability, tokens, products):
    names = launches(generate(Operator(compute=compute), operator_inputs(tokens, batch=1), capability))
    assert not any("_residual_kernel" in name for name in names)
    assert sum(name.startswith(products) for name in names) == 2
