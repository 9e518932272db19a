"""Device functions of fp4.py, exhaustively against ops.codec."""

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
CASES = {
    "encode_e2m1": ("encode_e2m1", (E2M1_INPUTS,)),
    "round_e2m1": ("round_e2m1", (E2M1_INPUTS,)),
    "decode_e2m1": ("decode_e2m1", (EVERY_BYTE[:16],)),
    "round_e4m3": ("round_e4m3", (E4M3_INPUTS,)),
    "decode_e4m3": ("decode_e4m3", (EVERY_BYTE,)),
    "magnitude_bits": ("magnitude_bits", (random_float32(),)),
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


def test_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import svdq_kernels"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
