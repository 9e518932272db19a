"""The code Inductor generates for q, k and v of two streams, on GPUs that need not be there."""

import pytest
import torch
from torch import nn

from svdq_compile.ops.joint_heads import joint_heads
from svdq_compile.testing.checkpoints import SMALL
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
HEADS, HEAD_DIM, IN_FEATURES = 2, 128, 256
CONFIG = SMALL | {
    "num_layers": 1,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "axes_dims_rope": [16, 56, 56],
}
BETWEEN = ("_heads_kernel", "_expand_kernel", "_prepare_kernel", "_sum_kernel", "_token_scale_kernel")
"""All that the linears ahead of attention launch."""


class Block(nn.Module):
    """A transformer block of a recipe, with the arguments it has in the model."""

    def __init__(self, recipe):
        super().__init__()
        model = random_transformer(CONFIG, recipe=recipe, rank=16, blocks_kept=0, compute="fp8")
        self.block = model.transformer_blocks[0]

    def forward(self, image, text, temb, image_table, text_table):
        return self.block(image, text, None, temb, (image_table, text_table))


class Operator(nn.Module):
    """The operator itself on two streams' linears."""

    def __init__(self, ranks=(16, 16), bias=True, dynamic=False, compute="fp8"):
        super().__init__()
        self.compute = compute
        self.streams = nn.ModuleList(
            nn.ModuleList(
                random_linear(HEADS * HEAD_DIM, IN_FEATURES, rank=rank, bias=bias, dynamic=dynamic, smooth=bool(rank))
                for _ in range(3)
            )
            for rank in ranks
        )

    def forward(self, x, y, norm, tables):
        lists = []
        for linears in self.streams:
            weights = [linear.weight for linear in linears]
            own = [getattr(w, name) for name in ("qweight", "weight_scale", "weight_scale_2") for w in weights]
            shared = [getattr(weights[0], name) for name in ("input_scale", "pre_quant_scale", "lora_down")]
            up, bias = [w.lora_up for w in weights], [linear.bias for linear in linears]
            lists.append([*own, *shared, *up, *bias])
        return joint_heads([x, y], *lists, [norm, norm, None, None], tables, HEAD_DIM, 1e-6, self.compute)


def tables(*tokens):
    return [torch.randn(count, HEAD_DIM // 2, 2) for count in tokens]


def block_inputs(image=150, text=130):
    width = HEADS * HEAD_DIM
    streams = torch.randn(1, image, width).bfloat16(), torch.randn(1, text, width).bfloat16()
    return *streams, torch.randn(1, width).bfloat16(), *map(torch.view_as_complex, tables(image, text))


def operator_inputs(first=130, second=150, batch=2):
    x, y = (torch.randn(batch, count, IN_FEATURES).bfloat16() for count in (first, second))
    return x, y, torch.randn(HEAD_DIM).bfloat16(), tables(first, second)


def generate(module, arguments, capability=(9, 0), **options):
    with fake_gpu(capability):
        return compile_on_fake_gpu(module, arguments, backend="svdq", fullgraph=True, **options)


def stem(name):
    return name.rstrip("0123456789").removesuffix("_")


def fused(code):
    return [kernel for kernel in kernels(code) if stem(kernel.name) == "_heads_kernel"]


@pytest.mark.parametrize("recipe", ["mixed", "all"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_block_writes_nothing_between_its_linears_and_attention(recipe, dynamic):
    code = generate(Block(recipe), block_inputs(), dynamic=dynamic)
    names = [stem(name) for name in launches(code)]
    ahead = names[: next(i for i, name in enumerate(names) if "attention" in name)]
    assert ahead.count("_heads_kernel") == 1
    # Inductor makes nothing of the norms, whose moments are one launch.
    behind = ahead[ahead.index("_modulation_kernel") :]
    assert behind.count("_modulation_kernel") == 1
    assert set(behind) <= {*BETWEEN, "_modulation_kernel"}
    assert not any("modulated_norm" in name for name in ahead)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("options", "second"),
    [({}, 150), ({"ranks": (0, 0)}, 150), ({"bias": False}, 150), ({"dynamic": True}, 150), ({"ranks": (0, 32)}, 1500)],
    ids=str,
)
def test_one_kernel_for_both_streams(options, second, dynamic):
    code = generate(Operator(**options), operator_inputs(second=second), dynamic=dynamic)
    names = [stem(name) for name in launches(code)]
    assert names.count("_heads_kernel") == 1
    assert set(names) <= set(BETWEEN)
    (kernel,) = fused(code)
    (compiled,) = compile_kernel(kernel.source, "_heads_kernel", (9, 0))
    assert "e4m3.e4m3" in compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0]
    assert not CUOBJDUMP.exists() or spills(compiled) == 0


@pytest.mark.parametrize(
    ("compute", "capability", "first"),
    [("bf16", (9, 0), 130), ("nvfp4", (9, 0), 130), ("fp8", (8, 0), 130), ("fp8", (10, 0), 130), ("fp8", (9, 0), 8)],
)
def test_what_the_kernel_does_not_compute_stays_the_operator(compute, capability, first):
    code = generate(Operator(compute=compute), operator_inputs(first, batch=1), capability)
    assert not fused(code)
    assert any("joint_heads" in name for name in launches(code))
