"""Packed NVFP4 products: numbers from the decoding branch.

No interpreter and no older GPU multiplies block-scaled operands, so what a test without such a GPU can see of the
native branch is its instructions. The other branch shares all of its indexing, masks and epilogue.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from svdq_compile.ops import codec, reference
from svdq_compile.testing.oracle import assert_bits_equal, assert_within_budget

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from svdq_kernels import blockscaled  # noqa: E402
from svdq_kernels.blockscaled import multiply_nvfp4  # noqa: E402
from svdq_kernels.fp4 import encode_e4m3  # noqa: E402
from svdq_kernels.packed import quantize_nvfp4_packed  # noqa: E402

HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = (*HALF_DTYPES, torch.float32)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# Numbers


@triton.jit
def _encode_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, encode_e4m3(tl.load(in_ptr + offs)))


def encode(values):
    out = torch.empty_like(values, dtype=torch.uint8)
    _encode_kernel[(1,)](values, out, BLOCK=values.numel())
    return out


FUNCTIONS = {"encode": encode, "multiply": multiply_nvfp4, "quantize": quantize_nvfp4_packed}


def move(value, device):
    """Arguments on another device, strides and offset kept."""
    if isinstance(value, tuple):
        return tuple(move(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = value.new_empty(0).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())


def interpret(cases, folder):
    """Results of (name, args) from Triton's interpreter, which needs a process that starts with it."""
    torch.save(cases, folder / "cases.pt")
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "cases.pt"), str(folder / "results.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


def on_gpu(cases, folder):
    return [move(FUNCTIONS[name](*move(args, "cuda")), "cpu") for name, args in cases]


RUNNERS = [interpret, pytest.param(on_gpu, marks=(gpu, needs_gpu))]


@pytest.mark.parametrize("runner", RUNNERS)
def test_encode_e4m3_inverts_decoding(runner, tmp_path):
    # Every value that is not negative; code 127 is NaN.
    codes = torch.arange(128, dtype=torch.uint8)
    (actual,) = runner([("encode", (codes.view(torch.float8_e4m3fn).float(),))], tmp_path)
    assert_bits_equal(actual, codes)


def normal(shape, g):
    return torch.randn(shape, generator=g)


def wide_range(shape, g):
    """Magnitudes from 1e-4 to 1e4 in one block."""
    return normal(shape, g) * 10 ** (normal(shape, g) * 2).clamp(-4, 4)


def quarters(shape, g):
    """Multiples of 1/4 up to 6: half of them are ties where block and tensor scale are powers of two."""
    return torch.randint(-24, 25, shape, generator=g) / 4


def zero_blocks(shape, g):
    """Blocks of +0 and -0 between others; the first token has nothing else."""
    x = normal(shape, g).unflatten(-1, (-1, 16))
    x = torch.where(torch.rand(*x.shape[:-1], 1, generator=g) < 0.5, x * 0, x).flatten(-2)
    x[:1] *= 0
    return x


def not_finite(shape, g):
    """A NaN or an infinity in some of the tokens."""
    x = normal(shape, g)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(3, shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 1 / (4 * shape[1]), special, x)


FILLS = (normal, wide_range, quarters, zero_blocks, not_finite)
STATIC_SCALES = (None, 1.0, 2.0**-9, 0.0123, 3e-7, 400.0)


def contiguous(x):
    return x


def padded_rows(x):
    return torch.cat([x, x, x], 1)[:, : x.shape[1]]


def unaligned(x):
    """Rows start 1 element past an aligned address, and their stride is odd."""
    return torch.cat([x[:, :1], x, x[:, : 1 + x.shape[1] % 2]], 1)[:, 1 : 1 + x.shape[1]]


def transposed(x):
    return x.t().contiguous().t()


LAYOUTS = (contiguous, padded_rows, unaligned, transposed)


def activations(m, k, dtype, fill, layout, smooth, static, seed):
    """Arguments of quantize_nvfp4_packed."""
    g = torch.Generator().manual_seed(seed)
    x = layout(fill((m, k), g).to(dtype))
    s = (torch.rand(k, generator=g) * 2 + 0.1).to(dtype) if smooth else None
    return x, s, torch.tensor(static) if static else None


def assert_quantized(actual, x, s, t):
    """The bits of codec.quantize_nvfp4; NaN scales are NaN, and zeros in a token that is not finite have no sign."""
    codes, scale, actual_t = actual
    x_hat = reference.smooth(x, s)
    wanted_t = reference.dynamic_input_scale(x_hat) if t is None else t
    wanted_codes, wanted_scale = codec.quantize_nvfp4(x_hat.float(), wanted_t)
    assert (codes.dtype, codes.shape, codes.is_contiguous()) == (torch.uint8, (x.shape[0], x.shape[1] // 2), True)
    finite = x_hat.isfinite().all(-1, keepdim=True)
    codes = codec.unpack_codes(codes)
    codes, wanted_codes = (torch.where(~finite & (c == 8), 0, c) for c in (codes, wanted_codes))
    assert_bits_equal(codes, wanted_codes)
    for a, b in ((scale, wanted_scale), (actual_t, wanted_t)):
        nan = a.float().isnan()
        assert torch.equal(nan, b.float().isnan())
        assert a.dtype == b.dtype
        assert_bits_equal(a.float().masked_fill(nan, 0), b.float().masked_fill(nan, 0))


def test_quantizes_like_the_codec_in_the_interpreter(tmp_path):
    cases = []
    for seed, fill in enumerate(FILLS):
        for static in STATIC_SCALES:
            layout = LAYOUTS[len(cases) % len(LAYOUTS)]
            # Smoothing in float32 alone: the interpreter does not round 16 bits to nearest even.
            for m, k in ((3, 48), (1, 1040)):
                cases.append(activations(m, k, torch.float32, fill, layout, True, static, seed))
                cases.append(activations(m, k, DTYPES[len(cases) % 3], fill, layout, False, static, seed))
    cases.append(activations(0, 64, torch.bfloat16, normal, contiguous, True, None, 0))
    results = interpret([("quantize", args) for args in cases], tmp_path)
    for args, actual in zip(cases, results):
        assert_quantized(actual, *args)


@gpu
@needs_gpu
@given(
    st.builds(
        activations,
        st.sampled_from((0, 1, 15, 17, 129)),
        st.sampled_from((16, 32, 48, 272, 1040, 3072)),
        st.sampled_from(DTYPES),
        st.sampled_from(FILLS),
        st.sampled_from(LAYOUTS),
        st.booleans(),
        st.sampled_from(STATIC_SCALES),
        st.integers(0, 2**32),
    )
)
def test_quantizes_like_the_codec(args):
    assert_quantized(move(quantize_nvfp4_packed(*move(args, "cuda")), "cpu"), *args)


def operands(m, n, k, rank, splits, per_token, bias, lora_dtype, out_dtype, layout, seed):
    """Arguments of multiply_nvfp4 as quantisation makes them; rank None has no low-rank branch."""
    g = torch.Generator().manual_seed(seed)
    i = torch.rand(m, 1, generator=g) * 3e-3 + 1e-4 if per_token else torch.tensor(2.5e-3)
    t = torch.tensor(1e-3)
    x_codes, x_scale = codec.quantize_nvfp4(normal((m, k), g), i)
    w_codes, w_scale = codec.quantize_nvfp4(normal((n, k), g) / max(k, 1) ** 0.5, t)
    return (
        layout(codec.pack_codes(x_codes)),
        layout(x_scale.view(torch.uint8)).view(torch.float8_e4m3fn),
        codec.pack_codes(w_codes),
        w_scale,
        i,
        t,
        None if rank is None else normal((splits, m, rank), g),
        None if rank is None else (normal((n, rank), g) / max(rank, 1) ** 0.5).to(lora_dtype),
        normal((n,), g).to(lora_dtype) if bias else None,
        out_dtype,
    )


def exact_operands(m, n, k, rank, splits, per_token, bias, lora_dtype, out_dtype, layout, seed):
    """Arguments of multiply_nvfp4 whose every sum float32 holds exactly, in any order: all multiples of 2**-5 and
    below 2**19."""
    g = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=g).float()

    def scales(rows):
        return 2.0 ** integers(0, 1, rows, k // 16)

    return (
        layout(integers(0, 255, m, k // 2).byte()),
        layout(scales(m).to(torch.float8_e4m3fn).view(torch.uint8)).view(torch.float8_e4m3fn),
        integers(0, 255, n, k // 2).byte(),
        scales(n).to(torch.float8_e4m3fn),
        2.0 ** integers(-1, 1, m, 1) if per_token else torch.tensor(0.5),
        torch.tensor(0.25),
        None if rank is None else integers(-4, 4, splits, m, rank),
        None if rank is None else integers(-4, 4, n, rank).to(lora_dtype),
        integers(-100, 100, n).to(lora_dtype) if bias else None,
        out_dtype,
    )


def decoded(codes, scale, dtype=torch.float64):
    return codec.decode_nvfp4(codec.unpack_codes(codes), scale, dtype)


def oracle(x_codes, x_scale, qweight, weight_scale, i, t, partials, lora_up, bias, out_dtype):
    """Float64 sums of exactly the given numbers."""
    y = decoded(x_codes, x_scale) @ decoded(qweight, weight_scale).t() * (i.double() * t.double())
    if lora_up is not None:
        y = y + partials.double().sum(0) @ lora_up.double().t()
    return y if bias is None else y + bias.double()


def low_precision(x_codes, x_scale, qweight, weight_scale, i, t, partials, lora_up, bias, out_dtype):
    """Operands multiplied out, and every product in the result's dtype."""
    x = (decoded(x_codes, x_scale) * i.double()).to(out_dtype)
    w = (decoded(qweight, weight_scale) * t.double()).to(out_dtype)
    y = F.linear(x, w, None if bias is None else bias.to(out_dtype))
    if lora_up is not None:
        y = y + F.linear(partials.sum(0).to(lora_up.dtype).to(out_dtype), lora_up.to(out_dtype))
    return y


def check_product(actual, args):
    assert (actual.dtype, actual.is_contiguous()) == (args[-1], True)
    assert_within_budget(actual, oracle(*args), low_precision=low_precision(*args))


def arguments(make, rows, columns, inner):
    """Draws arguments; sizes on both sides of every tile."""
    return st.builds(
        make,
        st.sampled_from(rows),
        st.sampled_from(columns),
        st.sampled_from(inner),
        st.sampled_from((None, 0, 1, 7, 16, 33, 64, 128, 130)),
        st.sampled_from((1, 2, 5)),
        st.booleans(),
        st.booleans(),
        st.sampled_from(HALF_DTYPES),
        st.sampled_from(DTYPES),
        st.sampled_from(LAYOUTS[:3]),
        st.integers(0, 2**32),
    )


ROWS = (0, 1, 2, 127, 128, 129, 257)
COLUMNS = (0, 1, 3, 64, 65, 127, 129, 272)
INNER = (16, 32, 48, 64, 80, 128, 240, 256, 272, 528)


def interpreted_products(make, out_dtypes):
    """Arguments the interpreter computes exactly: it multiplies float16, not bfloat16."""
    half = torch.float16
    shapes = [
        (1, 1, 16, None, 1, False, True),
        (3, 5, 48, 0, 1, True, False),
        (130, 66, 64, 7, 2, False, True),
        (129, 65, 80, 33, 1, True, True),
        (2, 130, 272, 130, 3, True, False),
        (257, 3, 32, 64, 1, False, False),
        (5, 272, 144, 16, 5, True, True),
        (0, 3, 32, 4, 1, False, True),
        (3, 0, 32, 4, 1, False, True),
        # More rows of tiles than one band has.
        (128 * blockscaled.GROUP_M + 1, 65, 16, 1, 1, True, True),
    ]
    cases = []
    for seed, (m, n, k, rank, splits, per_token, bias) in enumerate(shapes):
        dtype, layout = out_dtypes[seed % len(out_dtypes)], LAYOUTS[seed % 3]
        cases.append(make(m, n, k, rank, splits, per_token, bias, half, dtype, layout, seed))
    return cases


def test_exact_products_in_the_interpreter(tmp_path):
    cases = interpreted_products(exact_operands, (torch.float32,))
    for args, actual in zip(cases, interpret([("multiply", args) for args in cases], tmp_path)):
        assert_bits_equal(actual, oracle(*args).float())


def test_projections_may_be_summed_before(tmp_path):
    """As few tokens' are, in the dtype the sum is rounded to."""
    args = exact_operands(5, 66, 48, 7, 1, False, True, torch.float16, torch.float32, contiguous, 0)
    summed = (*args[:6], args[6].half(), *args[7:])
    for actual in interpret([("multiply", args), ("multiply", summed)], tmp_path):
        assert_bits_equal(actual, oracle(*args).float())


def test_products_in_the_interpreter(tmp_path):
    cases = interpreted_products(operands, (torch.float32, torch.float16))
    for args, actual in zip(cases, interpret([("multiply", args) for args in cases], tmp_path)):
        check_product(actual, args)


@gpu
@needs_gpu
@given(arguments(exact_operands, ROWS, COLUMNS, INNER))
def test_exact_products(args):
    # One rounding, of a number float32 holds.
    actual = multiply_nvfp4(*move(args, "cuda"))
    assert_bits_equal(actual, oracle(*args).to(args[-1]))


@gpu
@needs_gpu
@given(arguments(operands, ROWS, COLUMNS, INNER))
def test_within_budget(args):
    check_product(multiply_nvfp4(*move(args, "cuda")), args)


@gpu
@needs_gpu
@pytest.mark.parametrize(("n", "k", "rank"), [(3072, 3072, 32), (3072, 12288, 128), (12288, 3072, 32)])
def test_real_shapes(n, k, rank):
    args = operands(1000, n, k, rank, 4, False, True, torch.bfloat16, torch.bfloat16, contiguous, 0)
    on_device = move(args, "cuda")
    actual = multiply_nvfp4(*on_device)
    assert_within_budget(actual, oracle(*on_device), low_precision=low_precision(*on_device))


@gpu
@needs_gpu
@given(
    st.sampled_from((1, 17, 129)),
    st.sampled_from((48, 272, 1040)),
    st.sampled_from(HALF_DTYPES),
    st.sampled_from(LAYOUTS),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_quantize_then_multiply(m, k, dtype, layout, dynamic, seed):
    """The whole linear from x, whose rows need not be contiguous."""
    n, rank, splits = 65, 8, 2
    x, s, t = activations(m, k, dtype, normal, layout, True, None if dynamic else 2.5e-3, seed)
    _, _, qweight, w_scale, _, w_t, _, lora_up, bias, _ = operands(
        m, n, k, rank, splits, False, True, dtype, dtype, contiguous, seed
    )
    x_hat = reference.smooth(x, s)
    lora_down = normal((rank, k), torch.Generator().manual_seed(seed)) / k**0.5
    halves = zip(x_hat.float().tensor_split(splits, 1), lora_down.tensor_split(splits, 1))
    partials = torch.stack([a @ b.t() for a, b in halves])
    codes, scale, i = quantize_nvfp4_packed(*move((x, s, t), "cuda"))
    rest = (qweight, w_scale, i, w_t, partials, lora_up, bias)
    actual = multiply_nvfp4(codes, scale, *move(rest, "cuda"), dtype)
    wanted_i = reference.dynamic_input_scale(x_hat) if dynamic else t
    wanted = codec.quantize_nvfp4(x_hat.float(), wanted_i)
    args = (codec.pack_codes(wanted[0]), wanted[1], qweight, w_scale, wanted_i, *rest[3:], dtype)
    check_product(actual, args)


@gpu
@needs_gpu
def test_runs_are_equal():
    args = move(operands(257, 272, 528, 33, 5, True, True, *[torch.bfloat16] * 2, contiguous, 0), "cuda")
    first = multiply_nvfp4(*args)
    for _ in range(3):
        assert_bits_equal(multiply_nvfp4(*args), first)


@gpu
@needs_gpu
def test_output_is_fully_written(monkeypatch):
    args = move(operands(129, 65, 80, 8, 2, False, True, *[torch.bfloat16] * 2, contiguous, 0), "cuda")
    wanted = multiply_nvfp4(*args)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    assert_bits_equal(multiply_nvfp4(*args), wanted)


@pytest.mark.parametrize("runner", RUNNERS)
def test_nan_stays_in_its_row_and_column(runner, tmp_path):
    clean = exact_operands(130, 66, 80, 8, 2, True, True, torch.float16, torch.float32, contiguous, 0)
    dirty = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in clean)
    # The last of each is what a tile repeats beyond M and N; the first block scales follow on the row before, where
    # a tile reads beyond K.
    for row in (5, 129):
        dirty[1].view(torch.uint8)[row, 1] = 0x7F
    for column in (3, 65):
        dirty[3].view(torch.uint8)[column, 0] = 0x7F
    without, with_nan = runner([("multiply", clean), ("multiply", dirty)], tmp_path)
    expected = torch.zeros(130, 66, dtype=torch.bool)
    expected[[5, 129]] = True
    expected[:, [3, 65]] = True
    assert torch.equal(with_nan.isnan(), expected)
    assert_bits_equal(with_nan[~expected], without[~expected])


@pytest.mark.parametrize("runner", RUNNERS)
def test_partials_are_added_in_ascending_order(runner, tmp_path):
    """Float32 sums that depend on the order."""
    m, n, rank = 3, 4, 1
    partials = torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)]).view(4, 1, 1).expand(4, m, rank).contiguous()
    args = list(exact_operands(m, n, 16, rank, 1, False, False, torch.float16, torch.float32, contiguous, 0))
    without = oracle(*args[:6], None, None, None, None).float()
    args[6], args[7] = partials, torch.ones(n, rank, dtype=torch.float16)
    # 2**24 + 1 rounds to 2**24, twice.
    args_reversed = [*args[:6], partials.flip(0).contiguous(), *args[7:]]
    forward, backward = runner([("multiply", tuple(args)), ("multiply", tuple(args_reversed))], tmp_path)
    assert_bits_equal(forward, without)
    # -(2**24) + 1 + 1 is exact.
    assert_bits_equal(backward, without + 2)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [(2**31 // 1536 + 2, 16, 3072), (16, 2**31 // 1536 + 2, 3072), (70000, 2**31 // 70000 + 130, 16)]
)
def test_beyond_32_bit_offsets(m, n, k, gpu_memory):
    """Codes of x, codes of the weight, the result."""
    gpu_memory(20)

    def rows(count):
        codes = torch.randint(256, (count, k // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.ones(count, k // 16, device="cuda").to(torch.float8_e4m3fn)

    (x_codes, x_scale), (qweight, w_scale) = rows(m), rows(n)
    one = torch.ones((), device="cuda")
    bias = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    rest = (one, one, None, None)
    whole = multiply_nvfp4(x_codes, x_scale, qweight, w_scale, *rest, bias, torch.bfloat16)
    corner = multiply_nvfp4(x_codes[-9:], x_scale[-9:], qweight[-9:], w_scale[-9:], *rest, bias[-9:], torch.bfloat16)
    assert_bits_equal(whole[-9:, -9:], corner)


GOOD = exact_operands(2, 3, 32, 4, 2, False, True, torch.bfloat16, torch.bfloat16, contiguous, 0)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(2, 16), "x is torch.float32"),
        (0, torch.zeros(2, 12, dtype=torch.uint8), r"\(2, 12\) codes"),
        (1, torch.zeros(2, 2), "x is torch.uint8 and torch.float32"),
        (1, GOOD[1][:, :1], r"x scale \(2, 1\)"),
        (2, torch.zeros(3, 16, dtype=torch.int8), "weight is torch.int8"),
        (3, GOOD[3][:2], r"weight scale \(2, 2\)"),
        (4, torch.ones(3), "input_scale is torch.float32, 3 values"),
        (4, torch.ones(()).half(), "input_scale is torch.float16"),
        (5, torch.ones(2), "weight_scale_2 is torch.float32, 2 values"),
        (6, None, "go together"),
        (6, torch.zeros(2, 4), r"partials is torch.float32 \(2, 4\)"),
        (6, torch.zeros(2, 2, 5), r"\(2, 2, 5\)"),
        (6, torch.zeros(2, 2, 4).half(), "partials is torch.float16"),
        (7, torch.zeros(3, 4), "lora_up is torch.float32"),
        (7, torch.zeros(2, 4).half(), r"lora_up is torch.float16 \(2, 4\)"),
        (8, torch.zeros(2), r"bias is torch.float32 \(2,\)"),
        (8, torch.zeros(3).int(), "bias is torch.int32"),
        (9, torch.float64, "out_dtype is torch.float64"),
    ],
)
def test_refuses(index, value, message):
    with pytest.raises(ValueError, match=message):
        multiply_nvfp4(*GOOD[:index], value, *GOOD[index + 1 :])


def test_refuses_a_weight_of_another_width():
    narrow = (GOOD[2][:, :8].contiguous(), GOOD[3][:, :1].contiguous())
    with pytest.raises(ValueError, match="x has 32 columns, the weight 16"):
        multiply_nvfp4(*GOOD[:2], *narrow, *GOOD[4:])


@pytest.mark.parametrize(
    ("x", "s", "t", "message"),
    [
        (torch.zeros(2, 32).double(), None, None, "float64"),
        (torch.zeros(2, 24), None, None, "24 columns"),
        (torch.zeros(2, 32), torch.ones(2, 16), None, r"\(2, 16\)"),
        (torch.zeros(2, 32), None, torch.ones(2, 1), "2 values"),
        (torch.zeros(2, 32), None, torch.ones(()).bfloat16(), "bfloat16"),
    ],
)
def test_quantize_refuses(x, s, t, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4_packed(x, s, t)


def test_nothing_to_compute():
    for m, n in ((0, 3), (2, 0)):
        args = exact_operands(m, n, 32, 4, 2, False, True, torch.bfloat16, torch.bfloat16, contiguous, 0)
        assert multiply_nvfp4(*args).shape == (m, n)
    codes, scale, t = quantize_nvfp4_packed(torch.zeros(0, 32), None, None)
    assert (codes.shape, scale.shape, t.shape) == ((0, 16), (0, 2), (0, 1))


if __name__ == "__main__":
    torch.cuda.get_device_capability = lambda device: (9, 0)
    names = torch.load(sys.argv[1])
    torch.save([FUNCTIONS[name](*args) for name, args in names], sys.argv[2])
