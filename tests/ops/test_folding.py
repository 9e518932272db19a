"""Folding the low-rank pair into an e4m3 weight: what docs/numerics.md says it loses, measured."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_compile.ops import codec
from svdq_compile.quality.metrics import sqnr
from svdq_compile.spec import COMPONENTS, E2M1_MAX, MODELOPT_LEAF
from svdq_compile.testing import folding
from svdq_compile.testing.oracle import assert_bits_equal

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "modelopt-two-blocks"
BRANCHES = [
    f"transformer_blocks.{block}.{layer}"
    for block in (0, 1)
    for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2")
]


@pytest.fixture(scope="module")
def export():
    return load_file(DATA / "diffusion_pytorch_model.safetensors"), load_file(DATA / "recorded_io.safetensors")


def linear_of(export, name):
    """Input, stored parts and bias of a recorded linear."""
    tensors, recorded = export
    keys = {part: f"{name}.{MODELOPT_LEAF[part]}" for part in COMPONENTS}
    parts = {part: tensors[key] for part, key in keys.items() if key in tensors}
    return recorded[f"linear.{name}.input"], parts, tensors[f"{name}.bias"]


def decibels(export, name):
    """SQNR of fp8 mode, unfolded and folded, against bf16 mode."""
    args = linear_of(export, name)
    exact = folding.stored(*args, "bf16")
    ways = {"fp8": folding.stored(*args, "fp8")}
    ways |= {way: folding.folded(*args, per_channel) for way, per_channel in folding.SCALES.items()}
    return {way: sqnr(y, exact) for way, y in ways.items()}


def documented(heading):
    """The rows of numerics.md's table with that first heading: first cell -> the others."""
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in rows}


def test_every_linear_with_a_branch_is_measured(export):
    leaf = MODELOPT_LEAF["lora_up"]
    assert {key.removesuffix(f".{leaf}") for key in export[0] if key.endswith(leaf)} == set(BRANCHES)


@pytest.mark.parametrize("name", BRANCHES)
def test_folding_loses_on_every_recorded_linear(export, name):
    fp8, *folded = decibels(export, name).values()
    assert max(folded) < fp8


def test_the_recorded_linears_are_those_of_the_table(export):
    found = [decibels(export, name) for name in BRANCHES]
    rows = documented("ModelOpt's recording, against bf16 mode")
    assert rows.keys() == found[0].keys()
    for way, (worst, best) in rows.items():
        values = [row[way] for row in found]
        assert (worst, best) == (f"{min(values):.1f}", f"{max(values):.1f}"), way


@pytest.mark.parametrize("per_channel", folding.SCALES.values(), ids=folding.SCALES.keys())
def test_where_nothing_is_rounded_folding_changes_nothing(per_channel):
    """Codes beside a pair of sevens: with the scale 7 / 448 every element is an e4m3 value, and every sum exact."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (24, 64), generator=generator, dtype=torch.uint8)
    codes[:, :16] = 0
    parts = {
        "qweight": codec.pack_codes(codes),
        "weight_scale": torch.ones(24, 4).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(1.0),
        "input_scale": torch.tensor(1.0) / E2M1_MAX,
        "pre_quant_scale": torch.tensor([0.5, 2.0]).repeat(32),
        "lora_down": torch.tensor([[7.0] * 16 + [0.0] * 48]),
        "lora_up": torch.tensor([[1.0], [-1.0]]).repeat(12, 1),
    }
    x = 2.0 * torch.randint(-3, 4, (19, 64), generator=generator)
    bias = torch.arange(24.0)
    assert_bits_equal(folding.folded(x, parts, bias, per_channel), folding.stored(x, parts, bias, "bf16"))


@pytest.mark.parametrize("strength", [0.0, 3.0, 30.0])
def test_random_weights(strength):
    """Whatever the branch's share, the weight itself in FP8 is nearer than the folded one."""
    found = folding.random_weights(512, strength)
    for way in folding.SCALES:
        assert found["bf16"][way] < found["bf16"]["fp8"]
        assert found["unquantised"][way] < found["unquantised"]["fp8"] < found["unquantised"]["bf16"]
        assert found["unquantised"][way] < found["unquantised"]["FP8"]
