"""The fake GPU: Inductor's CUDA code without a GPU, real machine code from it, and nothing left behind."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import triton
from torch._dynamo import device_interface
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx
from torch._subclasses import FakeTensorMode
from torch.utils._triton import has_triton

from svdq_compile.ops.weight import SVDQWeight
from svdq_compile.testing.fake_card import CARDS
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu, generated_code, gpu_caches
from svdq_compile.testing.generated import compile_kernel, kernels, launches
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.ptx import CUOBJDUMP, SHARED_MEMORY_BYTES, spills
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def mlp():
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).bfloat16()


def external(code):
    return [name for name in launches(code) if not name.startswith("triton_")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_dense_mlp_becomes_triton_and_cublas(dynamic):
    with fake_gpu():
        code = compile_on_fake_gpu(mlp(), (torch.randn(40, 64).bfloat16(),), backend="inductor", dynamic=dynamic)
    assert launches(code) == ["extern_kernels.addmm", kernels(code)[0].name, "extern_kernels.addmm"]
    (gelu,) = kernels(code)
    assert gelu.name.startswith("triton_poi_fused_gelu")
    assert gelu.launches == 1
    assert "@triton.jit" in gelu.source


def test_generated_kernels_compile_for_every_generation():
    """Whatever card the source was generated for."""
    layers = nn.Sequential(nn.LayerNorm(512), nn.GELU()).bfloat16()
    with fake_gpu((8, 0)):
        code = compile_on_fake_gpu(layers, (torch.randn(40, 512).bfloat16(),), backend="inductor")
    (kernel,) = kernels(code)
    for capability, shared in SHARED_MEMORY_BYTES.items():
        compiled = compile_kernel(kernel.source, kernel.name, capability)
        assert compiled
        for binary in compiled:
            assert f".target sm_{capability[0]}{capability[1]}" in binary.asm["ptx"]
            assert binary.metadata.shared <= shared
            assert not CUOBJDUMP.exists() or spills(binary) == 0
    with pytest.raises(ValueError, match="no kernel 'nonsense'"):
        compile_kernel(kernel.source, "nonsense")


def test_a_quantised_linear_compiles_for_the_card():
    layer = random_linear(64, 128)
    layers = nn.Sequential(layer, nn.GELU())
    with fake_gpu((9, 0)):
        code = compile_on_fake_gpu(layers, (torch.randn(40, 128).bfloat16(),), backend="svdq", fullgraph=True)
    assert any("svdq.linear" in name or name.startswith("triton_tem_") for name in launches(code))
    assert "extern_kernels.mm" not in launches(code)
    # The module given is not the one compiled.
    assert isinstance(layers[0].weight, SVDQWeight)
    assert layers[0].weight.device.type == "cpu"
    assert layers[0] is layer


def test_the_backends_options_arrive():
    """CUDA graphs cut the wrapper into partitions; their launches count like all others."""
    layers = nn.Sequential(random_linear(64, 128), nn.GELU(), random_linear(64, 64, bias=False))
    x = torch.randn(40, 128).bfloat16()
    with fake_gpu():
        code = compile_on_fake_gpu(layers, (x,))
        graphs = compile_on_fake_gpu(layers, (x,), mode="reduce-overhead")
    assert "def partition_0" in graphs
    assert "def partition_0" not in code
    assert launches(graphs) == launches(code)


def test_every_graph_is_there():
    def forward(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    module = nn.Module()
    module.forward = forward
    with fake_gpu():
        code = compile_on_fake_gpu(module, (torch.randn(40),), backend="inductor")
    assert [kernel.name for kernel in kernels(code)] == ["triton_poi_fused_sin_0", "triton_poi_fused_cos_0"]


def test_an_image_transformer_block():
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    with torch.device("meta"):
        block = QwenImageTransformerBlock(dim=32, num_attention_heads=2, attention_head_dim=16).bfloat16()
    linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        block.set_submodule(name, random_linear(module.out_features, module.in_features))
    inputs = {
        "hidden_states": torch.empty(1, 48, 32, dtype=torch.bfloat16),
        "encoder_hidden_states": torch.empty(1, 5, 32, dtype=torch.bfloat16),
        "encoder_hidden_states_mask": None,
        "temb": torch.empty(1, 32, dtype=torch.bfloat16),
        "image_rotary_emb": tuple(torch.empty(n, 8, dtype=torch.complex64) for n in (48, 5)),
    }
    with fake_gpu():
        code = compile_on_fake_gpu(block, inputs, fullgraph=True)
    assert not [name for name in launches(code) if name.startswith("extern_kernels.")]
    assert external(code).count("torch.ops.aten._scaled_dot_product_flash_attention.default") == 1
    fused = [name for name in launches(code) if name.startswith(("triton_tem_", "_gelu_quantize_kernel"))]
    assert len(fused) >= len(linears) == 14


def test_attention_with_a_mask():
    class Attention(nn.Module):
        def forward(self, x, mask):
            return nn.functional.scaled_dot_product_attention(x, x, x, mask)

    x = torch.empty(2, 4, 40, 16, dtype=torch.bfloat16)
    with fake_gpu():
        code = compile_on_fake_gpu(Attention(), (x, torch.ones(2, 1, 1, 40, dtype=torch.bool)), backend="inductor")
    assert external(code) == ["torch.ops.aten._scaled_dot_product_efficient_attention.default"]


def test_launches_are_read_in_order():
    code = """
a = async_compile.triton('a', '''source of a''', device_str='cuda')
b = async_compile.triton('b', '''source of b''', device_str='cuda')
def partition_0(args):
    b.run(buf0, 1, stream=stream0)
class Runner:
    def call(self, args):
        buf0 = empty_strided_cuda((1, ), (1, ), torch.float32)
        torch.ops.svdq.linear.default(buf0)
        (buf1,) = self.partitions[0](partition0_args)
        a.run(buf1, 1, stream=stream0)
        torch.ops.aten.view_as_complex.default(buf1)
        extern_kernels.mm(buf1, buf1, out=buf2)
        b.run(buf2, 1, stream=stream0)
def benchmark_compiled_module(args):
    a.run(args)
a = async_compile.triton('a', '''another source of a''', device_str='cuda')
def call(args):
    a.run(args[0], 1, stream=stream0)
"""
    assert launches(code) == ["torch.ops.svdq.linear.default", "b", "a", "extern_kernels.mm", "b", "a"]
    assert [(k.name, k.source, k.launches) for k in kernels(code)] == [
        ("b", "source of b", 2),
        ("a", "source of a", 1),
        ("a", "another source of a", 1),
    ]


def test_code_of_a_direct_call():
    """What ``generated_code`` is given need not go through Dynamo."""
    with fake_gpu(), FakeTensorMode() as mode:
        x = torch.empty(40, device="cuda")
        graph = torch.fx.symbolic_trace(lambda x: x[1:].sin())
        code = generated_code(lambda: compile_fx(graph, [x]))
        assert x.fake_mode is mode
    (name,) = launches(code)
    assert "sin" in name
    with pytest.raises(RuntimeError, match="no code"):
        generated_code(lambda: None)


@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_torch_sees_the_card(capability):
    with fake_gpu(capability, multi_processor_count=7) as card:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert torch.cuda.get_device_capability() == torch.cuda.get_device_capability("cuda:0") == capability
        assert torch.cuda.get_device_properties(0) is card
        assert card.multi_processor_count == 7
        assert card.shared_memory_per_block_optin == SHARED_MEMORY_BYTES[capability]
        assert has_triton()
        assert triton.runtime.driver.active.get_current_target().arch == 10 * capability[0] + capability[1]
        with pytest.raises(RuntimeError, match="fake GPU"):
            torch.cuda.init()


def test_misuse():
    with pytest.raises(ValueError, match="choose one of"), fake_gpu((1, 0)):
        pass
    with pytest.raises(RuntimeError, match="inside of fake_gpu"):
        compile_on_fake_gpu(mlp(), (torch.randn(40, 64).bfloat16(),))


def state():
    """Everything the fake GPU replaces, and the answers torch remembers about GPUs."""
    return {
        **{f"torch.cuda.{name}": value for name, value in vars(torch.cuda).items()},
        **{f"interface of {name}": value for name, value in device_interface.device_interfaces.items()},
        **{f"inductor {name}": value for name, value in inductor_config.get_config_copy().items()},
        "accelerator": torch.accelerator.is_available,
        "avoid_device_init": vars(FakeTensorMode)["avoid_device_init"],
        "attention": nn.functional.scaled_dot_product_attention,
        "driver": triton.runtime.driver._active,
        "triton": has_triton(),
        "available": torch.cuda.is_available(),
        "indexing": index_a_fake_tensor(),
    }


def index_a_fake_tensor():
    """What a CPU-only build refuses."""
    try:
        with FakeTensorMode():
            return torch.empty(2, device="cuda")[0].shape
    except RuntimeError as error:
        return str(error)


def fail_on_nested_cards(layer, x):
    with fake_gpu((12, 0)):
        with fake_gpu((9, 0)):
            assert "svdq" in compile_on_fake_gpu(layer, (x,))
        assert torch.cuda.get_device_capability() == (12, 0)
        assert "svdq" in compile_on_fake_gpu(layer, (x,))
        raise ZeroDivisionError


def test_nothing_stays_behind():
    layer = random_linear(32, 48)
    x = torch.randn(5, 48).bfloat16()
    before = state()
    with pytest.raises(ZeroDivisionError):
        fail_on_nested_cards(layer, x)
    assert not any(cache.cache_info().currsize for cache in gpu_caches())
    after = state()
    assert [key for key in before if after[key] is not before[key] and after[key] != before[key]] == []
    assert_bits_equal(torch.compile(layer, backend="svdq", fullgraph=True)(x), layer(x))
    dense = mlp()
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(torch.compile(dense, fullgraph=True)(x), dense(x))
