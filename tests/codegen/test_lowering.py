"""The code Inductor generates for quantised linears, on GPUs that need not be there."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.errors import StrictError
from svdq_compile.options import OPTIONAL_PASSES
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear

CAPABILITIES = ((8, 0), (9, 0), (10, 0), (12, 0))
MMA = {(8, 0): "mma.sync", (9, 0): "wgmma.mma_async", (10, 0): "tcgen05.mma", (12, 0): "mma.sync"}

DENSE = ["_prepare_kernel", "_expand_kernel", "triton_tem"]
SUMMED = ["_prepare_kernel", "_sum_kernel", "_expand_kernel", "triton_tem"]
"""The same where K is long enough to be projected down in several slices."""

EXPANDED = ["_prepare_kernel", "triton_tem"]
FEED_FORWARD = [*DENSE[:2], "_gelu_quantize_kernel", "_sum_kernel", "_expand_kernel", "triton_tem"]
"""Two linears with GELU between them: no activation kernel for the second, but a sum of its down-projections."""

BLOCKSCALED = ["_quantize_packed_kernel", "_prepare_kernel", "triton_tem"]


LAUNCHES_OF_A_BLOCK = {
    "mixed": {
        "": 20,
        "joint_heads": 26,
        "joint_heads,real_rope": 34,
        "joint_linear": 22,
        "share_inputs": 41,
        "fuse_feed_forward": 27,
        "joint_feed_forward": 25,
        "modulate": 22,
    },
    "all": {
        "": 24,
        "joint_heads": 30,
        "joint_heads,real_rope": 38,
        "joint_linear": 26,
        "share_inputs": 46,
        "fuse_feed_forward": 31,
        "joint_feed_forward": 29,
        "modulate": 26,
    },
}
"""Recipe -> passes skipped -> launches.

Each GEMM of ours has one launch that unpacks its weights, the first linears of both feed-forward layers one together.
Without joint_heads: a GEMM for each stream, two norms with rotation and a copy of values, and moments found stream by
stream. Without real_rope as well: 4 complex products, and norms apart from each other and from the concatenation
behind them. Without joint_linear: a GEMM. Without share_inputs, which joint_heads needs: more activation kernels and
GEMMs, and low-rank factors modulated one by one; in the mixed recipe, where modulations are not smoothed, theirs too.
fuse_feed_forward: the second linears' activation kernels, for their first GEMMs make the operands, and what
joint_feed_forward saves: GEMMs, moments found stream by stream, and sums of projections. modulate: moments of both
streams are one launch."""


class MLP(nn.Module):
    """What follows the linears in a transformer block: GELU, and gate * y + residual."""

    def __init__(self, mode, **options):
        super().__init__()
        self.up = random_linear(512, 128, compute=mode, **options)
        self.down = random_linear(128, 512, compute=mode, **options)

    def forward(self, x, gate):
        return x + gate * self.down(F.gelu(self.up(x), approximate="tanh"))


def inputs(tokens=600, dtype=torch.bfloat16):
    return torch.randn(1, tokens, 128, dtype=dtype), torch.randn(1, 1, 128, dtype=dtype)


def stems(code):
    """Launches without the numbers and operator names Inductor appends."""
    return ["triton_tem" if name.startswith("triton_tem") else name.rpartition("_")[0] for name in launches(code)]


def templates(code):
    return [kernel for kernel in kernels(code) if kernel.name.startswith("triton_tem")]


def generate(module, arguments, capability=(9, 0), **options):
    with fake_gpu(capability):
        return compile_on_fake_gpu(module, arguments, **options)


@pytest.mark.parametrize(
    ("capability", "mode", "expected"),
    [
        ((8, 0), "bf16", [*DENSE, *SUMMED]),
        ((8, 0), "nvfp4", [*DENSE, *SUMMED]),
        ((9, 0), "nvfp4", [*DENSE, *SUMMED]),
        ((10, 0), "nvfp4", 2 * BLOCKSCALED),
        ((12, 0), "auto", 2 * BLOCKSCALED),
    ],
)
def test_a_few_launches_a_linear_and_nothing_between(capability, mode, expected):
    code = generate(MLP(mode), inputs(), capability)
    assert stems(code) == expected
    first, second = templates(code)
    assert "exp2" in first.source
    assert "add" in second.name
    assert "mul" in second.name
    for kernel in (first, second):
        (compiled,) = compile_kernel(kernel.source, kernel.name, capability)
        assert MMA[capability] in compiled.asm["ptx"]
        if BLOCKSCALED[0] in expected:
            assert "kind::mxf4nvf4" in compiled.asm["ptx"]
        if CUOBJDUMP.exists():
            assert spills(compiled) == 0


@pytest.mark.parametrize("mode", ["fp8", "auto"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_first_e4m3_gemm_of_two_writes_the_operand_of_the_second(mode, dynamic):
    code = generate(MLP(mode), inputs(), dynamic=dynamic)
    assert stems(code) == FEED_FORWARD
    (second,) = templates(code)
    assert "add" in second.name
    assert "mul" in second.name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_projections_of_several_slices_are_summed_once(dynamic):
    linear = random_linear(256, 1024, compute="fp8")
    for tokens in (17, 1023, 2048):
        assert stems(generate(linear, (torch.randn(tokens, 1024).bfloat16(),), dynamic=dynamic)) == SUMMED


@pytest.mark.parametrize(("mode", "parts"), [("fp8", "bfloat16"), ("nvfp4", "float32"), ("bf16", "float32")])
def test_parts_of_projections_are_rounded_beside_e4m3_operands_only(mode, parts):
    code = generate(random_linear(256, 1024, compute=mode, rank=16), (torch.randn(2048, 1024).bfloat16(),))
    found = dict(re.findall(r"empty_strided_cuda\(\((\d+), 2048, 16\), .*?, torch\.(\w+)\)", code))
    assert found.pop("1") == "bfloat16"
    assert list(found.values()) == [parts]


@pytest.mark.parametrize("mode", ["fp8", "nvfp4", "bf16"])
def test_few_tokens_read_the_packed_weight(mode):
    code = generate(MLP(mode), inputs(1))
    assert stems(code) == 2 * ["_few_kernel", "triton_tem"]
    for kernel in templates(code):
        (compiled,) = compile_kernel(kernel.source, kernel.name, (9, 0))
        assert "few_tokens_product" in kernel.source
        if CUOBJDUMP.exists():
            assert spills(compiled) == 0


@pytest.mark.parametrize("mode", ["fp8", "bf16"])
@pytest.mark.parametrize("tokens", [1, 16])
def test_few_tokens_without_smoothing_and_low_rank_are_one_launch(mode, tokens):
    code = generate(MLP(mode, format=Format.NVFP4), inputs(tokens))
    assert stems(code) == 2 * ["triton_tem"]
    first, second = templates(code)
    assert "exp2" in first.source
    assert "add" in second.name


def test_an_expanded_weight_needs_no_unpacking():
    code = generate(MLP("fp8", format=Format.FP8_SVD), inputs())
    assert stems(code) == [name for name in FEED_FORWARD if name != "_expand_kernel"]


def test_smoothing_of_a_few_tokens_is_part_of_what_comes_before():
    class Modulation(nn.Sequential):
        def __init__(self):
            super().__init__(nn.SiLU(), random_linear(512, 128, compute="fp8", rank=0))

    code = generate(Modulation(), inputs(1)[:1])
    assert stems(code) == ["triton_poi_fused_linear_silu", "triton_tem"]
    pointwise = next(kernel for kernel in kernels(code) if kernel.name.startswith("triton_poi"))
    assert pointwise.source.count("tl.load(") == 2


@pytest.mark.parametrize(("tokens", "rows"), [(1, 128), (300, 384)])
def test_a_new_operand_has_memory_for_whole_tiles(tokens, rows):
    layer = random_linear(512, 128, compute="fp8", format=Format.FP8_SVD)
    code = generate(layer, inputs(tokens)[:1])
    assert f"empty_strided_cuda(({rows}, 128), (128, 1), torch.float8_e4m3fn)" in code
    (kernel,) = templates(code)
    assert "WHOLE_TILES : tl.constexpr = True" in kernel.source


def test_the_operand_another_gemm_writes_ends_at_its_last_row():
    (kernel,) = templates(generate(MLP("fp8"), inputs()))
    assert "WHOLE_TILES : tl.constexpr = False" in kernel.source


@pytest.mark.parametrize("mode", ["fp8", "nvfp4"])
def test_a_dynamic_scale_is_one_launch_more(mode):
    code = generate(MLP(mode, dynamic=True), inputs())
    assert stems(code) == ["_token_scale_kernel", *DENSE, "_token_scale_kernel", *SUMMED]


def test_without_smoothing_and_low_rank_x_is_the_operand():
    code = generate(MLP("bf16", format=Format.NVFP4), inputs())
    assert stems(code) == 2 * ["_expand_kernel", "triton_tem"]


@pytest.mark.parametrize(("mode", "expected"), [("fp8", FEED_FORWARD), ("nvfp4", [*DENSE, *SUMMED])])
def test_a_symbolic_number_of_tokens_stays_one(mode, expected):
    code = generate(MLP(mode), inputs(), dynamic=True)
    assert stems(code) == expected
    assert all("ks0" in kernel.source for kernel in templates(code))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("capability", "mode"), [((8, 0), "bf16"), ((9, 0), "fp8"), ((10, 0), "nvfp4")])
def test_results_of_two_billion_elements_are_addressed_by_64_bits(capability, mode, dynamic):
    layers = nn.Sequential(random_linear(12288, 64, compute=mode), nn.GELU())
    x = torch.empty(180_000, 64, dtype=torch.bfloat16, device="meta")
    (kernel,) = templates(generate(layers, (x,), capability, dynamic=dynamic))
    assert "INDEX_DTYPE : tl.constexpr = tl.int64" in kernel.source
    assert "idx_m = offs_m.to(INDEX_DTYPE)" in kernel.source
    (compiled,) = compile_kernel(kernel.source, kernel.name, capability)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[capability]


@pytest.mark.parametrize(("mode", "in_features"), [("fp8", 128), ("bf16", 64), ("bf16", 16)])
@pytest.mark.parametrize("tokens", [64, 300, 4096])
def test_one_step_over_in_features_makes_no_pipeline_of_tiles(mode, in_features, tokens):
    """Where the main loop has one step it is none, and Triton would pipeline the loop around it."""
    layers = nn.Sequential(random_linear(3072, in_features, compute=mode), nn.GELU())
    (kernel,) = templates(generate(layers, (torch.randn(tokens, in_features).bfloat16(),)))
    (compiled,) = compile_kernel(kernel.source, kernel.name, (9, 0))
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES[9, 0] // 2


def test_a_slice_of_tokens_is_not_copied():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = random_linear(128, 128, compute="fp8")

        def forward(self, x):
            return self.layer(x[:, 8:])

    assert stems(generate(Sliced(), inputs()[:1])) == DENSE


class Read(nn.Module):
    """A linear of something its input is a view of, or made of."""

    def __init__(self, function, mode="fp8", **options):
        super().__init__()
        self.function = function
        self.layer = random_linear(128, 128, compute=mode, **options)

    def forward(self, x):
        return self.layer(self.function(x))


CHANNELS_FIRST = {
    "transposed": lambda x: x.transpose(1, 2),
    "normalised": lambda x: F.layer_norm(x.transpose(1, 2), (128,)) * (1 + x[:, None, :, 0]) + x[:, None, :, 1],
}


@pytest.mark.parametrize("tokens", [4, 600])
@pytest.mark.parametrize("mode", ["fp8", "nvfp4", "bf16"])
@pytest.mark.parametrize("function", CHANNELS_FIRST.values(), ids=list(CHANNELS_FIRST))
def test_activations_with_channels_first_are_copied(function, mode, tokens):
    """Kernels read rows of unit stride, and the number of tokens is no stride of theirs."""
    code = generate(Read(function, mode), (torch.randn(1, 128, tokens).bfloat16(),))
    calls = code[code.index("def call(") :]
    assert f"(1, {tokens})" not in calls
    assert f"(1, 1, {tokens})" not in calls
    assert not any("arg0_1" in line for line in calls.splitlines() if "_kernel_" in line)


def test_an_operand_that_begins_between_two_16_bytes_is_copied():
    """Tensor descriptors cannot begin there."""

    def tail(x):
        return x[1:].view(300, 128)

    layer = Read(tail, "bf16", format=Format.NVFP4, smooth=False)
    assert stems(generate(layer, (torch.randn(1 + 300 * 128).bfloat16(),)))[0].startswith("triton_poi")
    even = Read(lambda x: x[8:].view(300, 128), "bf16", format=Format.NVFP4, smooth=False)
    assert stems(generate(even, (torch.randn(8 + 300 * 128).bfloat16(),))) == ["_expand_kernel", "triton_tem"]


def test_what_a_norm_was_made_of_is_not_read_once_it_was_written_to():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (random_linear(128, 128, compute="fp8") for _ in range(2))

        def forward(self, x, scale, shift, columns):
            x = x * 2
            y = F.layer_norm(x, (128,)) * (1 + scale) + shift
            a = self.first(y)
            x[:, columns] = a[:, :5]
            return self.second(x) * self.second(y)

    x, scale, shift = (torch.randn(1, n, 128).bfloat16() for n in (300, 1, 1))
    code = generate(Written(), (x, scale, shift, torch.arange(5)))
    normed, written, read_again = (name for name in launches(code) if name.startswith("_prepare_kernel"))
    assert normed != written
    assert read_again == written


@pytest.mark.parametrize(("mode", "dtype"), [("modelopt", torch.bfloat16), ("fp8", torch.float32)])
def test_what_no_kernel_takes_stays_the_operator(mode, dtype):
    code = generate(MLP(mode), inputs(dtype=dtype))
    assert launches(code).count("torch.ops.svdq.linear.default") == 2
    with pytest.raises(Exception, match="slower path") as caught:
        generate(MLP(mode), inputs(dtype=dtype), options={"strict": True})
    assert isinstance(caught.value, StrictError) or isinstance(caught.value.inner_exception, StrictError)


def test_strict_accepts_the_kernels():
    assert stems(generate(MLP("auto"), inputs(), options={"strict": True})) == FEED_FORWARD


def test_a_mode_may_be_an_option():
    code = generate(MLP("auto"), inputs(), options={"compute": "bf16"})
    assert "fp8e4nv" not in "".join(kernel.source for kernel in templates(code))


def test_under_inductor_alone_the_operator_stays_opaque():
    code = generate(MLP("fp8"), inputs(), backend="inductor")
    assert launches(code).count("torch.ops.svdq.linear.default") == 2


@pytest.fixture(scope="module", params=LAUNCHES_OF_A_BLOCK)
def block(request):
    """A recipe, a Qwen-Image block with all of its linears quantised, and arguments of its forward."""
    config = SMALL | {"num_layers": 1, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}
    model = random_transformer(config, recipe=request.param, blocks_kept=0, rank=16, compute="fp8")
    arguments = {
        "hidden_states": torch.randn(1, 400, 128, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.randn(1, 136, 128, dtype=torch.bfloat16),
        "encoder_hidden_states_mask": None,
        "temb": torch.randn(1, 128, dtype=torch.bfloat16),
        "image_rotary_emb": (
            torch.polar(torch.ones(400, 32), torch.rand(400, 32)),
            torch.polar(torch.ones(136, 32), torch.rand(136, 32)),
        ),
    }
    return request.param, model.transformer_blocks[0], arguments


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_modulated_norm_leaves_nothing_but_its_moments(dynamic):
    """What it would have written is made by the activation kernels; both read moments that are found once."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (random_linear(n, 3072, compute="fp8") for n in (256, 128))

        def forward(self, x, scale, shift):
            y = F.layer_norm(x, (3072,), None, None, 1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
            return self.first(y), self.second(y)

    x, scale, shift = (torch.randn(size, dtype=torch.bfloat16) for size in ((1, 300, 3072), (1, 3072), (1, 3072)))
    code = generate(Normed(), (x, scale, shift), dynamic=dynamic)
    assert stems(code) == 2 * ["_modulation_kernel", *SUMMED]
    finding = [kernel for kernel in kernels(code) if "'mean0_ptr': '*fp32'" in kernel.source]
    assert [kernel.launches for kernel in finding] == [1]
    # A part of the projection takes the sums of its own slice.
    summed, projected = (set(re.findall(rf"'{name}': (\d+)", code)) for name in ("SLICE0", "SPLIT_K"))
    assert len(summed) == 1
    assert summed == projected


def test_a_norm_that_autocast_computes_in_float32_stays_float32():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = random_linear(256, 128, compute="fp8")

        def forward(self, x, scale):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return self.layer(F.layer_norm(x, (128,)) * (1 + scale) + scale)

    code = generate(Normed(), inputs())
    assert "modulated_norm" not in code
    assert launches(code) == launches(generate(Normed(), inputs(), options={"skip_passes": "modulate"}))


def test_a_transformer_block(block):
    """Quantised linears are templates, grouped where they share; attention's are the only other matrix products."""
    recipe, *module = block
    names = launches(generate(*module))
    assert sum(name.startswith("triton_tem") for name in names) == {"mixed": 1, "all": 2}[recipe]
    assert sum(name.startswith("_heads_kernel") for name in names) == 1
    assert sum(name.startswith("_residual_kernel") for name in names) == 2
    assert sum(name.startswith("_gelu_quantize_kernel") for name in names) == 2
    assert not any("extern_kernels" in name or "aten.mul" in name for name in names)
    assert "torch.ops.svdq.linear.default" not in names


def test_a_block_normalises_in_its_activation_kernels(block):
    """Two norms of text and two of image, read by groups and feed-forward layers."""
    _, *module = block
    activations = [kernel for kernel in kernels(generate(*module)) if kernel.name.startswith("_prepare_kernel")]
    assert sum(kernel.launches for kernel in activations if "'mean_ptr': '*fp32'" in kernel.source) == 4


@pytest.mark.parametrize("skipped", ["", *OPTIONAL_PASSES, "joint_heads,real_rope"])
def test_what_each_pass_saves(block, skipped):
    recipe, *module = block
    code = generate(*module, options={"skip_passes": skipped})
    assert len(launches(code)) == LAUNCHES_OF_A_BLOCK[recipe].get(skipped, LAUNCHES_OF_A_BLOCK[recipe][""])
