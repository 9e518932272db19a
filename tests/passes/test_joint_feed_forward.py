"""The feed-forward layers of two streams: one operator, and only those."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdq_compile.ops.feed_forward import feed_forward
from svdq_compile.ops.joint_feed_forward import joint_feed_forward
from svdq_compile.ops.modulated_norm import modulated_norm
from svdq_compile.spec import Format
from svdq_compile.testing.checkpoints import SMALL
from svdq_compile.testing.graphs import PassRecorder
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.random_model import random_transformer
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "on_an_h100")
FEATURES, HIDDEN = 32, 64
CONFIG = SMALL | {"num_layers": 1, "attention_head_dim": 64, "axes_dims_rope": [16, 24, 24]}


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_bits_equal(a, b)


def compiled(module, inputs, **options):
    """The recorder of a module whose results stay as they are."""
    recorder = PassRecorder("joint_feed_forward")
    with torch.no_grad():
        expected = module(*(each.clone() for each in inputs))
        assert_same(torch.compile(module, backend=recorder, fullgraph=True, **options)(*inputs), expected)
    return recorder


class Block(nn.Module):
    """A transformer block with the arguments it has in the model."""

    def __init__(self, recipe, layers=1, compute="fp8"):
        super().__init__()
        config = CONFIG | {"num_layers": layers}
        self.blocks = random_transformer(
            config, recipe=recipe, rank=8, blocks_kept=0, compute=compute
        ).transformer_blocks

    def forward(self, image, text, temb, image_table, text_table):
        for block in self.blocks:
            text, image = block(image, text, None, temb, (image_table, text_table))
        return text, image


def block_inputs(batch=2, image=24, text=20):
    g = torch.Generator().manual_seed(0)
    width = CONFIG["num_attention_heads"] * 64
    angles = [torch.randn(count, 32, generator=g) for count in (image, text)]
    tables = [torch.polar(torch.ones_like(each), each) for each in angles]
    sizes = (batch, image, width), (batch, text, width), (batch, width)
    return *(torch.randn(size, generator=g).bfloat16() for size in sizes), *tables


@pytest.mark.parametrize("recipe", ["mixed", "all", "nvfp4", "fp8"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_real_block(recipe, dynamic):
    recorder = compiled(Block(recipe), block_inputs(), dynamic=dynamic)
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert (recorder.count(joint_feed_forward), recorder.count(feed_forward)) == (1, 0)
    # The norms of both streams ahead of attention and ahead of their feed-forward layers.
    assert recorder.count(modulated_norm) == 4
    for node in recorder.graphs[0].graph.nodes:
        assert "example_value" in node.meta or node.op == "output"


def test_every_block_of_one_graph():
    recorder = compiled(Block("mixed", layers=3), block_inputs())
    assert (len(recorder.report.matched), recorder.report.left) == (3, ())


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_sizes_change(dynamic):
    """One graph serves all sizes of a kind; few tokens are another kind, whose linears are apart."""
    block, recorder = Block("mixed"), PassRecorder("joint_feed_forward")
    run = torch.compile(block, backend=recorder, fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for sizes in ((24, 20), (24, 23), (36, 30), (50, 18)):
            inputs = block_inputs(1, *sizes)
            assert_same(run(*inputs), block(*inputs))
        seen = len(recorder.reports)
        assert seen <= (1 if dynamic else 3)
        assert all(len(reports["joint_feed_forward"].matched) == 1 for reports in recorder.reports)
        for text in (16, 9):
            inputs = block_inputs(1, 24, text)
            assert_same(run(*inputs), block(*inputs))
    few = [reports["joint_feed_forward"] for reports in recorder.reports[seen:]]
    assert few
    assert all(report.matched == () and "no e4m3 GEMM" in report.left[0][1] for report in few)


class Layer(nn.Module):
    def __init__(self, hidden=HIDDEN, **options):
        super().__init__()
        options = {"compute": "fp8"} | options
        self.up = random_linear(hidden, FEATURES, **options)
        self.down = random_linear(FEATURES, hidden, **options)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Streams(nn.Module):
    """Two layers and what is done with them."""

    def __init__(self, use, first=None, second=None):
        super().__init__()
        self.first, self.second, self.use = first or Layer(), second or Layer(format=Format.NVFP4), use

    def forward(self, x, y, gate, shift):
        return self.use(self.first, self.second, x, y, gate, shift)


def inputs(tokens=(40, 30), batches=(1, 1)):
    """Both streams, and two gates."""
    g = torch.Generator().manual_seed(0)
    sizes = zip((*batches, *batches), (*tokens, 1, 1), strict=True)
    return tuple(torch.randn(batch, count, FEATURES, generator=g).bfloat16() for batch, count in sizes)


def independent(first, second, x, y, gate, other):
    return x + gate * first(x), y + other * second(y)


def with_dropout(first, second, x, y, gate, other):
    return F.dropout(first(x), 0.5, False) * gate + x, y + second(y) * other


def used_behind_both(first, second, x, y, gate, other):
    """What the second needs is computed behind the first's sum."""
    total = x + gate * first(x)
    y = y * 2
    shift = other - 1
    text = y + shift * second(y - 1)
    return total * 2, text + total[:, :1], total


def of_one_tensor(first, second, x, y, gate, other):
    return x + gate * first(x), x + other * second(x), y


@pytest.mark.parametrize("use", [independent, with_dropout, used_behind_both, of_one_tensor])
@pytest.mark.parametrize("batch", [1, 2])
def test_independent_layers_are_joined(use, batch):
    recorder = compiled(Streams(use), inputs(batches=(batch, batch)))
    assert (len(recorder.report.matched), recorder.report.left) == (1, ())
    assert (recorder.count(joint_feed_forward), recorder.count(feed_forward)) == (1, 0)


def one_behind_the_other(first, second, x, y, gate, other):
    total = x + gate * first(x)
    return y + other * second(total[:, :30]), total


def directly(first, second, x, y, gate, other):
    total = x + gate * first(x)
    return total + other * second(total), y


def its_residual(first, second, x, y, gate, other):
    total = x + gate * first(x)
    return total + other * second(x), y


def the_first_sum_needs_the_second(first, second, x, y, gate, other):
    product = gate * first(x)
    return (x + other * second(x)) + product, y


def read_ahead(first, second, x, y, gate, other):
    total = x + gate * first(x)
    once_more = total * 2
    return y + other * second(y - 1), once_more


def written_between(first, second, x, y, gate, other):
    total = x + gate * first(x)
    y.add_(1)
    return total, y + other * second(y)


def its_sum_written(first, second, x, y, gate, other):
    total = x + gate * first(x)
    total.mul_(2)
    return total, y + other * second(y)


def without_a_gate(first, second, x, y, gate, other):
    return x + first(x), y + other * second(y)


def without_a_residual(first, second, x, y, gate, other):
    return x + gate * first(x), other * second(y)


def a_gate_per_token(first, second, x, y, gate, other):
    return x + x * first(x), y + other * second(y)


def kept(first, second, x, y, gate, other):
    result = first(x)
    return x + gate * result, y + other * second(y), result


LEFT = {
    one_behind_the_other: "is read before",
    directly: "depends on the other",
    its_residual: "depends on the other",
    the_first_sum_needs_the_second: "depends on the other",
    read_ahead: "is read before",
    written_between: "written to",
    its_sum_written: "written to",
    without_a_gate: "not multiplied with a gate",
    without_a_residual: "not added to a residual",
    a_gate_per_token: "the gate has another shape",
    kept: "read elsewhere",
}


@pytest.mark.parametrize("use", LEFT, ids=lambda use: use.__name__)
def test_what_would_compute_something_else_is_left(use):
    recorder = compiled(Streams(use), inputs())
    assert recorder.report.matched == ()
    (reason,) = recorder.reasons
    assert LEFT[use] in reason
    assert recorder.count(feed_forward) == 2


def test_batches_that_differ_are_left():
    recorder = compiled(Streams(independent), inputs(batches=(1, 2)))
    assert "another dtype, device, batch or features" in recorder.reasons[0]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ({}, {"hidden": 48}, "batch or features"),
        ({}, {"compute": "bf16"}, "computes as"),
        ({"compute": "bf16"}, {"compute": "bf16"}, "first linear is no e4m3 GEMM"),
        ({"compute": "nvfp4"}, {"compute": "nvfp4"}, "first linear is no e4m3 GEMM"),
        ({}, {"dynamic": True}, "depends on whole tokens"),
        ({"dynamic": True}, {}, "depends on whole tokens"),
        ({}, {"rank": 80}, "rank 80 is above"),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_compute_is_left(first, second, reason):
    recorder = compiled(Streams(independent, Layer(**first), Layer(**second)), inputs())
    assert recorder.report.matched == ()
    assert [reason in each for each in recorder.reasons] == [True]
    assert recorder.count(feed_forward) == 2


@pytest.mark.parametrize("tokens", [(40, 16), (5, 40)], ids=str)
def test_few_tokens_are_left(tokens):
    recorder = compiled(Streams(independent), inputs(tokens))
    assert [("no e4m3 GEMM" in each) for each in recorder.reasons] == [True]


@pytest.mark.parametrize("capability", [None, (8, 0), (10, 0)])
def test_other_devices_are_left(monkeypatch, capability):
    monkeypatch.setattr("svdq_compile.ops.cuda.capability", lambda device: capability)
    recorder = compiled(Streams(independent), inputs())
    assert recorder.report.matched == ()
    assert len(recorder.reasons) == 1


def three(first, second, x, y, gate, other):
    total = x + gate * first(x)
    total = total + gate * second(total)
    return total, y + other * first(y)


def test_a_layer_that_was_left_waits_for_none_behind_the_next():
    """The first is left alone, for the second depends on it; the second is joined with the third."""
    recorder = compiled(Streams(three), inputs())
    assert (len(recorder.report.matched), len(recorder.report.left)) == (1, 1)
    assert "depends on the other" in recorder.reasons[0]
    assert (recorder.count(joint_feed_forward), recorder.count(feed_forward)) == (1, 1)
