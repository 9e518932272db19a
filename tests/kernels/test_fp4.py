"""Device functions of fp4.py and the weight kernel, exhaustively against ops.codec."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from svdq_compile.ops import codec
from svdq_compile.testing.oracle import assert_bits_equal

pytest.importorskip("triton")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu))]


def every_bfloat16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def random_float32():
    g = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (2**16,), generator=g).int().view(torch.float32)


def midpoints_of(grid):
    """Halfway between neighbours of a sorted grid, with the float32 values next to each, both signs."""
    middle = (grid[1:] + grid[:-1]) / 2
    up, down = (torch.nextafter(middle, torch.full_like(middle, end)) for end in (torch.inf, -torch.inf))
    values = torch.cat([grid, middle, up, down])
    return torch.cat([values, -values])


E2M1_VALUES = codec.decode_e2m1(torch.arange(8, dtype=torch.uint8))
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E2M1_INPUTS = torch.cat([every_bfloat16(), random_float32(), midpoints_of(E2M1_VALUES)])
E4M3_INPUTS = torch.cat([every_bfloat16(), random_float32(), midpoints_of(E4M3_VALUES)]).abs()
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)
# Row n has every byte under scale n.
EVERY_PAIR = (EVERY_BYTE.expand(256, 256).clone(), EVERY_BYTE.view(256, 1).expand(256, 32).contiguous())
# More blocks than one program takes, and not a multiple of them.
TAIL = (EVERY_BYTE.repeat(5)[: 11 * 104].view(11, 104), EVERY_BYTE[: 11 * 13].view(11, 13))


def as_weight(qweight, scale_bits):
    return qweight, scale_bits.view(torch.float8_e4m3fn)


CASES = {
    "encode_e2m1": ("encode_e2m1", (E2M1_INPUTS,)),
    "round_e2m1": ("round_e2m1", (E2M1_INPUTS,)),
    "decode_e2m1": ("decode_e2m1", (EVERY_BYTE[:16],)),
    "round_e4m3": ("round_e4m3", (E4M3_INPUTS,)),
    "decode_e4m3": ("decode_e4m3", (EVERY_BYTE,)),
    "magnitude_bits": ("magnitude_bits", (random_float32(),)),
    "every pair": ("expand_nvfp4", as_weight(*EVERY_PAIR)),
    "tail": ("expand_nvfp4", as_weight(*TAIL)),
    "transposed": ("expand_nvfp4", as_weight(TAIL[0].t().contiguous().t(), TAIL[1].t().contiguous().t())),
    "no rows": ("expand_nvfp4", as_weight(TAIL[0][:0], TAIL[1][:0])),
}


@pytest.fixture(scope="module", params=DEVICES)
def results(request, tmp_path_factory):
    """Results of CASES, from the interpreter for the CPU."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save(list(CASES.values()), folder / "cases.pt")
    script = pathlib.Path(__file__).with_name("apply_kernels.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if request.param == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    files = [str(folder / "cases.pt"), str(folder / "results.pt")]
    command = [sys.executable, str(script), *files, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, torch.load(folder / "results.pt")))


def assert_same(actual, expected):
    """Equal bits; NaN is NaN, whatever its payload."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_bits_equal(actual.masked_fill(actual.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


def test_encode_e2m1(results):
    assert_bits_equal(results["encode_e2m1"], codec.encode_e2m1(E2M1_INPUTS))


def test_round_e2m1_is_decode_of_encode(results):
    assert_bits_equal(results["round_e2m1"], codec.decode_e2m1(codec.encode_e2m1(E2M1_INPUTS)))


def test_decode_e2m1(results):
    assert_bits_equal(results["decode_e2m1"], codec.decode_e2m1(EVERY_BYTE[:16]))


def test_round_e4m3(results):
    assert_same(results["round_e4m3"], codec.round_e4m3(E4M3_INPUTS).float())


def test_decode_e4m3(results):
    assert_same(results["decode_e4m3"], EVERY_BYTE.view(torch.float8_e4m3fn).float())


def test_magnitude_bits_order_as_magnitudes_with_nan_on_top(results):
    bits, values = results["magnitude_bits"], random_float32().abs()
    order = bits.argsort()
    nans = int(values.isnan().sum())
    assert nans
    assert values[order][-nans:].isnan().all()
    assert (values[order][:-nans].diff() >= 0).all()


@pytest.mark.parametrize("case", ["every pair", "tail", "transposed", "no rows"])
def test_expand_nvfp4(results, case):
    qweight, scale = CASES[case][1]
    expected = codec.decode_nvfp4(codec.unpack_codes(qweight), scale, torch.bfloat16)
    assert results[case].is_contiguous()
    assert_same(results[case], expected)
    # Nothing was rounded: the float32 product is the same number.
    assert_same(results[case].float(), codec.decode_nvfp4(codec.unpack_codes(qweight), scale))


@pytest.mark.parametrize(
    ("qweight", "scale", "message"),
    [
        (torch.zeros(4, 16, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.float8_e4m3fn), "int8"),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 2), "float32"),
        (torch.zeros(4, 16, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.float8_e4m3fn), r"\(4, 4\)"),
        (torch.zeros(4, 12, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.float8_e4m3fn), r"\(4, 12\)"),
    ],
)
def test_expand_refuses(qweight, scale, message):
    from svdq_kernels.expand import expand_nvfp4

    with pytest.raises(ValueError, match=message):
        expand_nvfp4(qweight, scale)


@pytest.mark.gpu
@needs_gpu
def test_expand_beyond_32_bit_offsets():
    from svdq_kernels.expand import expand_nvfp4

    n, k = 2**31 // 3072 + 2, 3072
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of GPU memory")
    row = torch.randint(256, (1, k // 2), dtype=torch.uint8, device="cuda")
    qweight = row.expand(n, -1).contiguous()
    scale = torch.ones(n, k // 16, device="cuda").to(torch.float8_e4m3fn)
    out = expand_nvfp4(qweight, scale)
    assert_bits_equal(out[-1:], expand_nvfp4(row, scale[:1]))


def test_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import svdq_kernels"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
