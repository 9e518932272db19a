"""q, k and v of two streams, normalised, rotated and joined for attention: one operator, and only those."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import nn

from svdq_compile.model.share import mark_shared
from svdq_compile.ops.joint_heads import joint_heads
from svdq_compile.ops.linear_group import linear_group
from svdq_compile.ops.modulated_norm import modulated_norm
from svdq_compile.testing.checkpoints import SMALL, example_inputs
from svdq_compile.testing.fake_gpu import compile_on_fake_gpu, fake_gpu
from svdq_compile.testing.graphs import PassRecorder
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear, share_activation

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
HEADS, HEAD_DIM = 2, 128
CONFIG = SMALL | {"attention_head_dim": HEAD_DIM, "num_attention_heads": HEADS, "axes_dims_rope": [16, 56, 56]}
LINEARS = ("add_q_proj", "add_k_proj", "add_v_proj"), ("to_q", "to_k", "to_v")


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)


class Block(nn.Module):
    """A transformer block with the arguments it has in the model."""

    def __init__(self, recipe="all", compute="fp8", **config):
        super().__init__()
        model = random_transformer(
            CONFIG | {"num_layers": 1} | config, recipe=recipe, rank=8, blocks_kept=0, compute=compute
        )
        self.block = model.transformer_blocks[0]

    def forward(self, image, text, temb, image_table, text_table, mask=None):
        return self.block(image, text, mask, temb, (image_table, text_table))


def table(tokens, generator):
    angles = torch.randn(tokens, HEAD_DIM // 2, generator=generator) * 9
    return torch.polar(torch.ones_like(angles), angles)


def block_inputs(batch=2, image=24, text=20):
    g = torch.Generator().manual_seed(0)
    sizes = ((batch, image, HEADS * HEAD_DIM), (batch, text, HEADS * HEAD_DIM), (batch, HEADS * HEAD_DIM))
    return *(torch.randn(size, generator=g).bfloat16() for size in sizes), table(image, g), table(text, g)


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("recipe", ["all", "nvfp4", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_real_block(recipe, dynamic):
    block, inputs, recorder = Block(recipe), block_inputs(), PassRecorder("joint_heads")
    actual = torch.compile(block, backend=recorder, fullgraph=True, dynamic=dynamic)(*inputs)
    assert_same(actual, block(*inputs))
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert recorder.count(joint_heads) == 1
    assert recorder.count(linear_group) == len(recorder.reports[0]["share_inputs"].matched) - 2
    # The norms of both streams ahead of attention and ahead of their feed-forward layers.
    assert recorder.count(modulated_norm) == 4
    assert recorder.count(torch.view_as_complex) == recorder.count(torch.cat) == recorder.count(torch.rsqrt) == 0
    rope = recorder.reports[0]["real_rope"]
    assert (rope.matched, rope.left) == ((), ())
    for node in recorder.graphs[0].graph.nodes:
        assert "example_value" in node.meta or node.op == "output"


@pytest.mark.usefixtures("on_an_h100")
def test_a_batch_with_masks():
    block, inputs, recorder = Block(), block_inputs(), PassRecorder("joint_heads")
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    actual = torch.compile(block, backend=recorder, fullgraph=True)(*inputs, mask)
    assert_same(actual, block(*inputs, mask))
    assert len(recorder.report.matched) == 1


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_sizes_change(dynamic):
    """One graph serves all sizes of a kind; few tokens are another kind, which no kernel computes in one."""
    block, recorder = Block(), PassRecorder("joint_heads")
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=dynamic)
    for sizes in ((24, 20), (24, 23), (36, 30), (50, 18), (19, 70)):
        inputs = block_inputs(1, *sizes)
        assert_same(compiled(*inputs), block(*inputs))
    seen = len(recorder.reports)
    assert seen <= (1 if dynamic else 3)
    assert all(len(reports["joint_heads"].matched) == 1 for reports in recorder.reports)
    for text in (16, 9):
        inputs = block_inputs(1, 24, text)
        assert_same(compiled(*inputs), block(*inputs))
    few = [reports["joint_heads"] for reports in recorder.reports[seen:]]
    assert len(few) in (1, 2)
    assert all(report.matched == () and "no e4m3 GEMM" in report.left[0][1] for report in few)


@pytest.mark.usefixtures("on_an_h100")
def test_eps_is_guarded_where_it_is_an_input():
    block, inputs, recorder = Block(), block_inputs(), PassRecorder("joint_heads")
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    compiled(*inputs)
    attn = block.block.attn
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        norm.eps = 0.25
    assert_same(compiled(*inputs), block(*inputs))
    assert [len(reports["joint_heads"].matched) for reports in recorder.reports] == [1, 1]
    attn.norm_k.eps = 0.5
    assert_same(compiled(*inputs), block(*inputs))
    assert recorder.reports[2]["joint_heads"].matched == ()
    assert "eps" in recorder.reports[2]["joint_heads"].left[0][1]


@pytest.mark.usefixtures("on_an_h100")
def test_a_whole_model_views_each_table_once():
    model = random_transformer(CONFIG | {"num_layers": 3}, recipe="all", rank=8, blocks_kept=0, compute="fp8")
    inputs, recorder = example_inputs(model, height=8, width=8, text=20), PassRecorder("joint_heads")
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_bits_equal(compiled(**inputs)[0], model(**inputs)[0])
    assert len(recorder.report.matched) == 3
    assert recorder.count(torch.view_as_real) == 2


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(
    ("compute", "config", "reason"),
    [
        ("bf16", {}, "no e4m3 GEMM"),
        ("nvfp4", {}, "no e4m3 GEMM"),
        ("modelopt", {}, "reproduces ModelOpt's"),
        ("fp8", {"attention_head_dim": 32, "num_attention_heads": 8}, "heads of 32"),
    ],
)
def test_a_block_no_kernel_computes_in_one(compute, config, reason):
    block, recorder = Block(compute=compute, **config), PassRecorder("joint_heads")
    *inputs, image_table, text_table = block_inputs()
    half = config.get("attention_head_dim", HEAD_DIM) // 2
    inputs = *inputs, image_table[:, :half], text_table[:, :half]
    actual = torch.compile(block, backend=recorder, fullgraph=True)(*inputs)
    assert_same(actual, block(*inputs))
    assert recorder.report.matched == ()
    assert len(recorder.report.left) == 3
    assert all(reason in each for each in recorder.reasons)
    assert len(recorder.reports[0]["real_rope"].matched) == 4


def test_other_devices_get_what_they_always_got():
    block, recorder = Block(), PassRecorder("joint_heads")
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    for inputs in (block_inputs(), block_inputs(text=5)):
        assert_same(compiled(*inputs), block(*inputs))
    assert recorder.count(joint_heads) == 0
    assert set(recorder.reasons) == {"the Triton kernels need an NVIDIA GPU"}
    assert len(recorder.reports[0]["real_rope"].matched) == 4


@pytest.mark.parametrize(("capability", "matched"), [((8, 0), 0), ((9, 0), 1), ((10, 0), 0)])
def test_the_gpu_decides(capability, matched):
    recorder = PassRecorder("joint_heads")

    def backend(gm, example_inputs):
        recorder(gm, example_inputs)
        return torch._dynamo.lookup_backend("svdq")(gm, example_inputs)

    with fake_gpu(capability):
        code = compile_on_fake_gpu(Block(), block_inputs(), backend=backend)
    assert len(recorder.report.matched) == matched
    assert code


class Attention(nn.Module):
    """What a block does ahead of attention, step by step, each of which a test may replace."""

    def __init__(self, bias=True, weights=True, **steps):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.norms = nn.ModuleList()
        for names, k in zip(LINEARS, (48, 64), strict=True):
            layers = [random_linear(HEADS * HEAD_DIM, k, generator=g, compute="fp8", bias=bias) for _ in names]
            share_activation(*layers)
            for name, layer in zip(names, layers, strict=True):
                setattr(self, name, layer)
        for _ in range(4):
            norm = RMSNorm(HEAD_DIM, 1e-6, elementwise_affine=weights).bfloat16().requires_grad_(False)
            self.norms.append(norm)
            if weights:
                norm.weight.data = torch.randn(HEAD_DIM, generator=g).bfloat16()
        self.mark()
        for name, step in steps.items():
            setattr(self, name, step)

    def mark(self):
        mark_shared({name: getattr(self, name).weight for names in LINEARS for name in names})
        return self

    @staticmethod
    def heads(y):
        return y.unflatten(-1, (-1, HEAD_DIM))

    @staticmethod
    def norm(module, heads):
        return module(heads)

    @staticmethod
    def rotate(heads, freqs):
        return apply_rotary_emb_qwen(heads, freqs, use_real=False)

    @staticmethod
    def join(q, k, v):
        return tuple(torch.cat(pair, dim=1) for pair in (q, k, v))

    @staticmethod
    def between(x, streams):
        return ()

    def forward(self, text, image, text_table, image_table):
        streams = []
        text = text.clone()
        for index, x, freqs in ((0, text, text_table), (1, image, image_table)):
            q, k, v = (self.heads(getattr(self, name)(x)) for name in LINEARS[index])
            q = self.rotate(self.norm(self.norms[2 * index], q), freqs)
            k = self.rotate(self.norm(self.norms[2 * index + 1], k), freqs)
            streams.append((q, k, v))
        more = self.between(text, streams)
        return *self.join(*zip(*streams, strict=True)), *more


def attention_inputs(batch=2, text=9, image=12):
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(batch, text, 48, generator=g).bfloat16(), torch.randn(batch, image, 64, generator=g).bfloat16())
    return *x, table(text, g), table(image, g)


def rewritten(module, inputs=None, **options):
    """What the passes did to a module, whose results must not change."""
    recorder, inputs = PassRecorder("joint_heads"), inputs or attention_inputs()
    actual = torch.compile(module, backend=recorder, fullgraph=True, **options)(*inputs)
    assert_same(actual, module(*inputs))
    return recorder


def function_norm(module, x):
    y = torch.rsqrt(torch.add(torch.mean(torch.pow(x.float(), 2), dim=[-1], keepdim=True), module.eps))
    return torch.mul(module.weight, torch.mul(y, x).to(x))


def operator_norm(module, x):
    y = (module.eps + (x.float() ** 2).mean(dim=-1, keepdim=True)).rsqrt()
    return x.mul(y).bfloat16().mul(module.weight)


def function_rotation(x, freqs):
    pairs = torch.view_as_complex(torch.unflatten(x.to(torch.float32), -1, (-1, 2)))
    return torch.flatten(torch.view_as_real(torch.unsqueeze(freqs, -2) * pairs), -2).bfloat16()


SAME = {
    "as it is": {},
    "no bias": {"bias": False},
    "no weights": {"weights": False},
    "norm of functions": {"norm": function_norm},
    "norm of operators": {"norm": operator_norm},
    "rotation of functions": {"rotate": function_rotation},
    "image first": {"join": lambda *parts: tuple(torch.cat(pair[::-1], dim=-3) for pair in parts)},
    "values first": {"join": lambda q, k, v: tuple(torch.concat(pair, 1) for pair in (v, k, q))},
    "view": {"heads": lambda y: y.reshape(*y.shape[:2], HEADS, HEAD_DIM)},
}


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_other_spellings(options, dynamic):
    recorder = rewritten(Attention(**options), dynamic=dynamic)
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert recorder.count(linear_group) == recorder.count(torch.rsqrt) == 0


@pytest.mark.usefixtures("on_an_h100")
def test_sequences_that_are_split_behind_the_linears_are_left():
    """As a custom attention processor may."""
    image, text = torch.randn(1, 24, 64).bfloat16(), torch.randn(1, 18, 48).bfloat16()
    _, _, *tables = attention_inputs(text=9, image=12)
    module = Attention(heads=lambda y: y.reshape(2, -1, HEADS, HEAD_DIM))
    recorder = rewritten(module, (text, image, *tables))
    assert recorder.report.matched == ()
    assert set(recorder.reasons) == {"the group's sequences are other ones than attention's"}


def written(x, streams):
    x += 1
    return (x,)


def read_elsewhere(x, streams):
    return (streams[0][0].sin(),)


def cube_norm(module, x):
    return (x * torch.rsqrt(x.float().pow(3).abs().mean(-1, keepdim=True) + 1e-6)).bfloat16() * module.weight


def mean_of_all(module, x):
    return (x * torch.rsqrt(x.float().pow(2).mean((-1, -2), keepdim=True) + 1e-6)).bfloat16() * module.weight


def half_norm(module, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * module.weight


def other_factor(module, x):
    return ((x + 1) * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16() * module.weight


def torch_norm(module, x):
    return F.rms_norm(x, (HEAD_DIM,), module.weight, 1e-6)


LEFT = {
    "no norm": ({"norm": lambda module, x: x}, "norm: not as diffusers"),
    "torch's norm": (
        {"norm": torch_norm},
        "norm: not as diffusers",
    ),
    "bias": ({"norm": lambda module, x: module(x) + module.weight}, "norm: not as diffusers"),
    "another power": ({"norm": cube_norm}, "norm:"),
    "mean of all heads": ({"norm": mean_of_all}, "another mean"),
    "16-bit norm": ({"norm": half_norm}, "norm:"),
    "another factor": ({"norm": other_factor}, "multiplies something else"),
    "no rotation": ({"rotate": lambda x, freqs: x}, "rotation: not as diffusers"),
    "other halves": (
        {"rotate": lambda x, freqs: apply_rotary_emb_qwen(x.flip(-1), freqs, use_real=False)},
        "not as diffusers",
    ),
    "conjugate": ({"rotate": lambda x, freqs: Attention.rotate(x, freqs.conj())}, "not plain complex64"),
    "double": ({"rotate": lambda x, freqs: Attention.rotate(x, freqs.to(torch.complex128))}, "another dtype"),
    "one position": ({"rotate": lambda x, freqs: Attention.rotate(x, freqs[:1])}, "no table of positions"),
    "another table": ({"rotate": lambda x, freqs: Attention.rotate(x, freqs * 1)}, "different tables"),
    "exchanged": (
        {"join": lambda q, k, v: Attention.join((q[0], k[1]), (k[0], q[1]), v)},
        "not each linear's heads",
    ),
    "twice": ({"join": lambda q, k, v: Attention.join(q, q, v)}, "not each linear's heads"),
    "no values": ({"join": lambda q, k, v: (torch.cat(q, 1), torch.cat(k, 1), v[0])}, "not each linear's heads"),
    "transposed": ({"heads": lambda y: y.unflatten(-1, (HEAD_DIM, -1)).mT.contiguous()}, "heads: not as"),
    "written": ({"between": written}, "written to"),
    "read elsewhere": ({"between": read_elsewhere}, "read elsewhere too"),
}


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(("options", "reason"), LEFT.values(), ids=LEFT)
def test_what_differs_is_left_and_said(options, reason):
    recorder = rewritten(Attention(**options))
    assert recorder.report.matched == ()
    assert recorder.count(joint_heads) == 0
    assert any(reason in each for each in recorder.reasons), recorder.reasons


class LateWeight(Attention):
    """Joins queries before it has the keys' weights, which depend on them."""

    def forward(self, text, image, text_table, image_table):
        tables = (text_table, image_table)
        parts = [
            [self.heads(getattr(self, name)(x)) for name in names]
            for names, x in zip(LINEARS, (text, image), strict=True)
        ]
        q, k, v = zip(*parts, strict=True)
        queries = torch.cat([self.rotate(self.norms[i](q[i]), tables[i]) for i in range(2)], dim=1)
        self.weight, self.eps = queries[0, 0, 0], 1e-6
        keys = torch.cat([self.rotate(operator_norm(self, k[i]), tables[i]) for i in range(2)], dim=1)
        return queries, keys, torch.cat(v, dim=1)


class LateTable(Attention):
    """Joins values before it has the tables, which depend on them."""

    def forward(self, text, image, text_table, image_table):
        parts = [
            [self.heads(getattr(self, name)(x)) for name in names]
            for names, x in zip(LINEARS, (text, image), strict=True)
        ]
        q, k, v = zip(*parts, strict=True)
        values = torch.cat(v, dim=1)
        tables = [each * values[0, 0, 0, 0] for each in (text_table, image_table)]
        queries = torch.cat([self.rotate(self.norms[2 * i](q[i]), tables[i]) for i in range(2)], dim=1)
        keys = torch.cat([self.rotate(self.norms[2 * i + 1](k[i]), tables[i]) for i in range(2)], dim=1)
        return queries, keys, values


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("module", [LateWeight, LateTable])
def test_what_the_first_concatenation_decides_is_left(module):
    recorder = rewritten(module())
    assert recorder.report.matched == ()
    assert set(recorder.reasons) == {"a norm's weight or a table is computed behind the first concatenation"}


def dense(a):
    a.to_k = nn.Linear(a.to_k.in_features, a.to_k.out_features).bfloat16().requires_grad_(False)


def own_smoothing(a):
    a.to_k.weight.pre_quant_scale = a.to_k.weight.pre_quant_scale * 2
    a.mark()


def other_mode(a):
    for name in LINEARS[1]:
        layer = getattr(a, name)
        layer.weight = nn.Parameter(layer.weight.with_compute("bf16"), requires_grad=False)


MODULES = {
    "a dense linear": (dense, "no group"),
    "smoothing of its own": (own_smoothing, "no group"),
    "another mode": (other_mode, "compute as"),
    "float32 weight": (lambda a: a.norms[3].float(), "norm:"),
    "another eps": (lambda a: setattr(a.norms[2], "eps", 1e-5), "eps differ"),
}


@pytest.mark.usefixtures("on_an_h100")
def test_norms_that_are_trained_are_left():
    module, recorder = Attention(), PassRecorder("joint_heads")
    weight = module.norms[0].weight.requires_grad_()
    with torch.enable_grad():
        results = torch.compile(module, backend=recorder, fullgraph=True)(*attention_inputs())
        sum(each.sum() for each in results).backward()
    assert weight.grad is not None
    assert recorder.report.matched == ()
    assert "gradients" in recorder.report.left[0][1]


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(("change", "reason"), MODULES.values(), ids=MODULES)
def test_layers_that_differ_are_left_and_said(change, reason):
    module = Attention()
    change(module)
    recorder = rewritten(module)
    assert recorder.report.matched == ()
    assert any(reason in each for each in recorder.reasons), recorder.reasons
