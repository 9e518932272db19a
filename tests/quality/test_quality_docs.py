"""docs/quality.md says what docs/quality.json holds, the output of the command it gives."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from svdq_compile import cli
from svdq_compile.cli import generate, verify

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "quality.md").read_text(encoding="utf-8")
DATA = json.loads((DOCS / "quality.json").read_text(encoding="utf-8"))
KINDS_IN = [("demo-output/nvfp4", mode) for mode in ("nvfp4", "fp8")]
KINDS_IN += [("demo-output/nvfp4_svd", mode) for mode in ("nvfp4", "fp8")]
"""Columns of the table of linears."""


def rows(heading):
    """The cells of the table whose first heading is given, without the two lines above them."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.splitlines()]


def commands(name):
    """The arguments of every call of a subcommand in the document."""
    fences = "\n".join(re.findall(r"^```\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    found = [shlex.split(line.split(">")[0]) for line in fences.splitlines()]
    return [cli._parser().parse_args(words[1:]) for words in found if words[:2] == ["svdq-compile", name]]


def test_checkpoints_and_modes():
    expected = []
    for row in DATA["comparisons"]:
        linears, drawn = row["summaries"][0], row["denoising"]
        decibels = [linears["worst"], linears["median"], linears["best"], row["model"]["sqnr"]]
        decibels += [drawn["psnr"], drawn["worst_psnr"]]
        cells = [*(f"{value:.2f}" for value in decibels), f"{drawn['ssim']:.3f}", f"{drawn['worst_ssim']:.3f}"]
        expected.append([row["checkpoint"].removeprefix("demo-output/"), row["compute"], *cells])
    assert rows("checkpoint") == expected
    assert not DATA["skipped"]


def test_linears_by_name():
    found = {(row["checkpoint"], row["compute"]): row["summaries"][1:] for row in DATA["comparisons"]}
    expected = []
    for each in zip(*(found[column] for column in KINDS_IN), strict=True):
        assert len({summary["name"] for summary in each}) == 1
        name = each[0]["name"].removeprefix("transformer_blocks.*.")
        expected.append([name, *(f"{summary['median']:.2f}" for summary in each)])
    assert rows("linear") == expected


def test_the_numbers_come_from_the_command():
    (args,) = commands("verify")
    verify.complete(args)
    plan = DATA["denoising"]
    for name in ("steps", "width", "height", "cfg", "negative_prompt"):
        assert getattr(args, name) == plan[name], name
    assert (args.prompt, list(args.seed)) == (plan["prompts"], plan["seeds"])
    assert [(row["checkpoint"], row["compute"]) for row in DATA["comparisons"]] == [
        (path, compute) for path in args.paths for compute in args.compute
    ]
    assert args.brief
    assert args.json
    assert args.denoise
    pictures = len(plan["prompts"]) * len(plan["seeds"])
    prose = " ".join(TEXT.split())
    assert f"of {pictures} pictures" in prose
    assert f"{DATA['inputs'].split()[0]} forward passes" in prose


def test_the_picture_comes_from_the_command():
    (args,) = commands("generate")
    options = generate.settings(args)
    assert options.output == "docs/quality.png"
    with Image.open(DOCS / "quality.png") as sheet:
        assert sheet.width > 192 * (1 + len(options.compare))
        assert 192 * options.count < sheet.height < 192 * (options.count + 1)


@pytest.mark.parametrize("name", ["quality.png", "quality.json"])
def test_files_stay_small(name):
    assert (DOCS / name).stat().st_size < 100_000
