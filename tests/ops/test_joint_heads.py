"""``svdq::joint_heads``: diffusers' own steps, one behind the other."""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

from svdq_compile.errors import SvdqError
from svdq_compile.ops.joint_heads import joint_heads
from svdq_compile.ops.modes import COMPUTE_MODES, NEEDS_CODES
from svdq_compile.spec import Format
from svdq_compile.testing.oracle import assert_bits_equal
from svdq_compile.testing.weights import random_linear, share_activation

# test_schema compares outputs with torch.allclose, which has no float8.
OPCHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FORMATS = [Format.NVFP4_SVD, Format.NVFP4, Format.FP8, Format.FP8_SVD]
HEADS, HEAD_DIM, EPS = 3, 16, 1e-6
TOKENS, FEATURES = (5, 7), (48, 64)


class Streams:
    """Two streams' linears and norms, and their activations."""

    def __init__(self, dtype=torch.bfloat16, batch=2, weights=True, **options):
        g = torch.Generator().manual_seed(0)
        self.layers = [
            [random_linear(HEADS * HEAD_DIM, k, generator=g, dtype=dtype, **options) for _ in range(3)]
            for k in FEATURES
        ]
        for layers in self.layers:
            share_activation(*layers)
        self.x = [torch.randn(batch, s, k, generator=g).to(dtype) for s, k in zip(TOKENS, FEATURES, strict=True)]
        self.norms = [RMSNorm(HEAD_DIM, EPS, elementwise_affine=weights).to(dtype) for _ in range(4)]
        for norm in self.norms if weights else ():
            norm.weight.data = torch.randn(HEAD_DIM, generator=g).to(dtype)
            norm.weight.requires_grad_(False)
        angles = [torch.randn(s, HEAD_DIM // 2, generator=g) * 9 for s in TOKENS]
        self.freqs = [torch.polar(torch.ones_like(each), each) for each in angles]

    @property
    def arguments(self):
        first = self.layers[0][0].weight
        return (
            self.x,
            *(self.parts(layers) for layers in self.layers),
            [norm.weight for norm in self.norms],
            [torch.view_as_real(table) for table in self.freqs],
            HEAD_DIM,
            EPS,
            first.operator_compute,
        )

    def parts(self, layers):
        weights = [layer.weight for layer in layers]
        parts = [getattr(w, name) for name in ("qweight", "weight_scale", "weight_scale_2") for w in weights]
        parts += [getattr(weights[0], name) for name in ("input_scale", "pre_quant_scale", "lora_down")]
        return [*parts, *(w.lora_up for w in weights), *(layer.bias for layer in layers)]

    def expected(self):
        parts = []
        for x, layers, norms, freqs in zip(
            self.x, self.layers, (self.norms[:2], self.norms[2:]), self.freqs, strict=True
        ):
            q, k, v = (layer(x).unflatten(-1, (-1, HEAD_DIM)) for layer in layers)
            q, k = (
                apply_rotary_emb_qwen(norm(y), freqs, use_real=False) for y, norm in zip((q, k), norms, strict=True)
            )
            parts.append((q, k, v))
        return [torch.cat(pair, dim=1) for pair in zip(*parts, strict=True)]


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.is_contiguous()
        assert_bits_equal(a, b)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_bits_are_those_of_diffusers_steps(format, compute):
    if format is Format.FP8_SVD and compute in NEEDS_CODES:
        pytest.skip("gave up the codes")
    streams = Streams(format=format, compute=compute)
    assert_same(joint_heads(*streams.arguments), streams.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", [False, True], ids=["no weights", "weights"])
def test_norms_and_dtypes(dtype, weights):
    streams = Streams(dtype=dtype, weights=weights, bias=False)
    assert_same(joint_heads(*streams.arguments), streams.expected())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(format, bias):
    arguments = Streams(format=format, bias=bias).arguments
    torch.library.opcheck(joint_heads, arguments, test_utils=OPCHECKS)


WRONG = {
    "an activation less": (0, lambda x: x[:1], "two streams"),
    "batch sizes": (0, lambda x: [x[0][:1], x[1]], "batch sizes"),
    "dtypes of the streams": (0, lambda x: [x[0].half(), x[1]], "the streams are"),
    "two dimensions": (0, lambda x: [x[0][0], x[1]], "three dimensions"),
    "features": (0, lambda x: x[::-1], "length|features"),
    "a part less": (1, lambda parts: parts[:-1], "needs 18"),
    "out_features": (2, lambda parts: [parts[0][:-1], *parts[1:]], "out_features"),
    "a norm less": (3, lambda norms: norms[:3], "four norms"),
    "a norm's size": (3, lambda norms: [norms[0][:-1], *norms[1:]], "norm's weight"),
    "a norm's dtype": (3, lambda norms: [norms[0].float(), *norms[1:]], "norm's weight"),
    "a table's dtype": (4, lambda freqs: [freqs[0].double(), freqs[1]], "float32"),
    "a table's length": (4, lambda freqs: [freqs[0][:-1], freqs[1]], "another length"),
    "a table's width": (4, lambda freqs: [freqs[0][:, :-1], freqs[1]], "does not fit"),
    "head_dim": (5, lambda head_dim: 32, "no multiple"),
    "odd head_dim": (5, lambda head_dim: 3, "not even"),
}


@pytest.mark.parametrize(("position", "change", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(position, change, message):
    given = list(Streams().arguments)
    given[position] = change(given[position])
    with pytest.raises(RuntimeError, match=message):
        joint_heads(*given)


def test_it_has_no_gradient():
    streams = Streams(dtype=torch.float32)
    streams.x[0].requires_grad_()
    with torch.enable_grad(), pytest.raises(SvdqError, match="no gradient"):
        sum(each.sum() for each in joint_heads(*streams.arguments)).backward()
