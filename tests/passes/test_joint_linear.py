"""The linears behind an attention of two streams, and their residuals: one operator, and only those."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.ops.joint_linear import joint_linear
from svdq_compile.ops.linear import linear
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL, example_inputs
from svdq_compile.testing.graphs import PassRecorder
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
WIDTH, IN_FEATURES = 64, 48
CONFIG = SMALL | {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": [16, 56, 56]}


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)


class Block(nn.Module):
    """A transformer block with the arguments it has in the model."""

    def __init__(self, recipe="all", compute="fp8"):
        super().__init__()
        config = CONFIG | {"num_layers": 1}
        model = random_transformer(config, recipe=recipe, rank=8, blocks_kept=0, compute=compute)
        self.block = model.transformer_blocks[0]

    def forward(self, image, text, temb, image_table, text_table):
        return self.block(image, text, None, temb, (image_table, text_table))


def block_inputs(batch=2, image=24, text=20):
    g = torch.Generator().manual_seed(0)
    sizes = (batch, image, 256), (batch, text, 256), (batch, 256)
    angles = [torch.randn(tokens, 64, generator=g) * 9 for tokens in (image, text)]
    tables = [torch.polar(torch.ones_like(each), each) for each in angles]
    return *(torch.randn(size, generator=g).bfloat16() for size in sizes), *tables


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("recipe", ["all", "mixed", "nvfp4", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_real_block(recipe, dynamic):
    block, inputs, recorder = Block(recipe), block_inputs(), PassRecorder("joint_linear")
    actual = torch.compile(block, backend=recorder, fullgraph=True, dynamic=dynamic)(*inputs)
    assert_same(actual, block(*inputs))
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert recorder.count(joint_linear) == 1
    for node in recorder.graphs[0].graph.nodes:
        assert "example_value" in node.meta or node.op == "output"


@pytest.mark.usefixtures("on_an_h100")
def test_a_whole_model():
    model = random_transformer(CONFIG | {"num_layers": 3}, recipe="all", rank=8, blocks_kept=0, compute="fp8")
    inputs, recorder = example_inputs(model, height=8, width=8, text=20), PassRecorder("joint_linear")
    compiled = torch.compile(model, backend=recorder, fullgraph=True)
    assert_bits_equal(compiled(**inputs)[0], model(**inputs)[0])
    assert len(recorder.report.matched) == 3


@pytest.mark.usefixtures("on_an_h100")
def test_sizes_change():
    """One graph serves all sizes of a kind; few tokens are another kind, which no kernel computes in one."""
    block, recorder = Block(), PassRecorder("joint_linear")
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    for sizes in ((24, 20), (24, 23), (36, 30), (50, 18), (19, 70)):
        inputs = block_inputs(1, *sizes)
        assert_same(compiled(*inputs), block(*inputs))
    assert [len(reports["joint_linear"].matched) for reports in recorder.reports] == [1]
    for text in (16, 9):
        inputs = block_inputs(1, 24, text)
        assert_same(compiled(*inputs), block(*inputs))
    assert all("no e4m3 GEMM" in reports["joint_linear"].left[0][1] for reports in recorder.reports[1:])


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(
    ("compute", "reason"), [("bf16", "no e4m3 GEMM"), ("nvfp4", "no e4m3 GEMM"), ("modelopt", "ModelOpt's")]
)
def test_a_block_no_kernel_computes_in_one(compute, reason):
    block, recorder, inputs = Block(compute=compute), PassRecorder("joint_linear"), block_inputs()
    assert_same(torch.compile(block, backend=recorder, fullgraph=True)(*inputs), block(*inputs))
    assert recorder.report.matched == ()
    assert len(recorder.report.left) == 2
    assert all(reason in each for _, each in recorder.report.left)


@pytest.mark.parametrize(("capability", "matched"), [((8, 0), 0), ((8, 9), 1), ((9, 0), 1), ((10, 0), 0), (None, 0)])
def test_the_gpu_decides(capability, matched, monkeypatch):
    for module in ("ops.cuda", "passes.joint_linear"):
        monkeypatch.setattr(f"svdq_compile.{module}.capability", lambda device: capability)
    assert len(rewritten(Behind()).report.matched) == matched


class Behind(nn.Module):
    """What a block does behind attention, step by step, each of which a test may replace."""

    def __init__(self, options=({}, {}), **steps):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        given = {"generator": g, "compute": "fp8"}
        self.image, self.text = (random_linear(WIDTH, IN_FEATURES, **given | own) for own in options)
        for name, step in steps.items():
            setattr(self, name, step)

    @staticmethod
    def split(whole, count):
        return whole[:, count:, :].contiguous(), whole[:, :count, :].contiguous()

    @staticmethod
    def drop(y):
        return F.dropout(y, 0.5, False)

    @staticmethod
    def gated(residual, gate, y):
        return residual + gate * y

    @staticmethod
    def late(gate, image):
        return gate

    @staticmethod
    def base(text, image):
        return text

    @staticmethod
    def between(y, residual):
        return ()

    def forward(self, whole, image, text, image_gate, text_gate):
        text = text.clone()
        x, other = self.split(whole, text.shape[1])
        y = self.drop(self.image(x))
        first = self.gated(image, image_gate, y)
        more = self.between(y, text)
        second = self.gated(self.base(text, first), self.late(text_gate, first), self.text(other))
        return first, second, *more


def behind_inputs(batch=2, image=24, text=20, width=WIDTH):
    g = torch.Generator().manual_seed(1)
    sizes = (batch, text + image, IN_FEATURES), (batch, image, width), (batch, text, width), *2 * [(batch, 1, width)]
    return [torch.randn(size, generator=g).bfloat16() for size in sizes]


def rewritten(module, inputs=None, **options):
    """What the pass did to a module, whose results must not change."""
    recorder, inputs = PassRecorder("joint_linear"), inputs or behind_inputs()
    actual = torch.compile(module, backend=recorder, fullgraph=True, **options)(*inputs)
    assert_same(actual, module(*inputs))
    return recorder


SAME = {
    "as it is": {},
    "no copies": {"split": lambda whole, count: (whole[:, count:], whole[:, :count])},
    "no dropout": {"drop": lambda y: y},
    "no probability": {"drop": lambda y: F.dropout(y, 0.0, True)},
    "functions": {"gated": lambda residual, gate, y: torch.add(torch.mul(y, gate), residual)},
    "methods": {"gated": lambda residual, gate, y: residual.add(gate.mul(y))},
    "overlapping": {"split": lambda whole, count: (whole[:, -24:], whole[:, 4:24])},
    "no bias": {"options": ({"bias": False}, {})},
    "other formats": {"options": ({}, {"format": Format.FP8})},
    "per token": {"options": ({"dynamic": True}, {})},
}


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("options", SAME.values(), ids=SAME)
def test_other_spellings(options, dynamic):
    recorder = rewritten(Behind(**options), dynamic=dynamic)
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert recorder.count(linear) == recorder.count(F.dropout) == 0


def written(y, residual):
    residual += 1
    return (residual,)


def added_in_place(residual, gate, y):
    residual = residual * 1
    residual += gate * y
    return residual


LEFT = {
    "trained dropout": ({"drop": lambda y: F.dropout(y, 1.0, True)}, "not multiplied"),
    "no gate": ({"gated": lambda residual, gate, y: residual + y}, "not multiplied"),
    "no residual": ({"gated": lambda residual, gate, y: (gate * y).sin()}, "not added"),
    "a factor": ({"gated": lambda residual, gate, y: torch.add(residual, gate * y, alpha=2)}, "not added"),
    "a number": ({"gated": lambda residual, gate, y: residual + 2 * y}, "not multiplied"),
    "a square": ({"gated": lambda residual, gate, y: residual + y * y}, "not multiplied"),
    "a gate of every token": ({"gated": lambda r, gate, y: r + gate.expand_as(r) * y}, "gate has another shape"),
    "a gate of all sequences": ({"gated": lambda r, gate, y: r + gate[:1] * y}, "gate has another shape"),
    "a gate of one dimension": ({"gated": lambda r, gate, y: r + gate[0, 0] * y}, "gate is no tensor"),
    "a wide gate": ({"gated": lambda r, gate, y: r + gate.float() * y}, "gate is no tensor"),
    "a wide residual": ({"gated": lambda r, gate, y: r.float() + gate * y}, "residual is no tensor"),
    "a residual of one token": ({"gated": lambda r, gate, y: r[:, :1] + gate * y}, "residual has another shape"),
    "in place": ({"gated": added_in_place}, "not added"),
    "written": ({"between": written}, "written to"),
    "read elsewhere": ({"between": lambda y, residual: (y.sin(),), "drop": lambda y: y}, "read elsewhere"),
    "one behind the other": ({"late": lambda gate, image: gate * image[:, :1]}, "before the other's"),
    "other modes": ({"options": ({"compute": "bf16"}, {})}, "compute as bf16 and fp8"),
    "too great a rank": ({"options": ({"rank": 272}, {})}, "rank 272"),
}


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize(("options", "reason"), LEFT.values(), ids=LEFT)
def test_what_differs_is_left_and_said(options, reason):
    recorder = rewritten(Behind(**options))
    assert recorder.report.matched == ()
    assert recorder.count(joint_linear) == 0
    assert len(recorder.report.left) == 2
    assert all(reason in each for _, each in recorder.report.left), recorder.report.left


@pytest.mark.usefixtures("on_an_h100")
def test_a_residual_that_is_the_other_streams_result_is_left():
    recorder = rewritten(Behind(base=lambda text, image: image), behind_inputs(image=20))
    assert recorder.report.matched == ()
    assert all("depends on the other" in reason for _, reason in recorder.report.left)


OTHERS = {
    "halves of features": lambda whole, count: (
        whole.repeat(1, 1, 2)[:, count:, :IN_FEATURES],
        whole.repeat(1, 1, 2)[:, :count, IN_FEATURES:],
    ),
    "two tensors": lambda whole, count: (whole.sin()[:, count:], whole.cos()[:, :count]),
    "no slices": lambda whole, count: (whole[:, count:].sin(), whole[:, :count].sin()),
    "chosen tokens": lambda whole, count: (whole[:, list(range(24))], whole[:, list(range(20))]),
}


@pytest.mark.usefixtures("on_an_h100")
@pytest.mark.parametrize("split", OTHERS.values(), ids=OTHERS)
def test_what_is_not_behind_one_attention_is_no_business_of_it(split):
    recorder = rewritten(Behind(split=split))
    assert (recorder.report.matched, recorder.report.left) == ((), ())


@pytest.mark.usefixtures("on_an_h100")
def test_other_widths_are_left():
    class Widths(Behind):
        def __init__(self):
            super().__init__()
            self.text = random_linear(2 * WIDTH, IN_FEATURES, compute="fp8")

    whole, image, text, image_gate, text_gate = behind_inputs()
    recorder = rewritten(Widths(), [whole, image, text.repeat(1, 1, 2), image_gate, text_gate.repeat(1, 1, 2)])
    assert recorder.report.matched == ()
    assert "features" in recorder.report.left[0][1]


@pytest.mark.usefixtures("on_an_h100")
def test_a_trained_gate_is_left():
    inputs, recorder = behind_inputs(), PassRecorder("joint_linear")
    inputs[3].requires_grad_()
    with torch.enable_grad():
        results = torch.compile(Behind(), backend=recorder, fullgraph=True)(*inputs)
        results[0].sum().backward()
    assert inputs[3].grad is not None
    assert recorder.report.matched == ()
    assert "gradients" in recorder.report.left[0][1]
