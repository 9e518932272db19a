"""inspect and explain: what they print is what the library says, as text and as JSON."""

import collections
import json

import pytest

import svdq_compile
from svdq_compile.cli import main
from svdq_compile.testing.checkpoints import SMALL, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("pipeline") / "transformer")


def test_inspect_text(checkpoint, capsys):
    assert main(["inspect", str(checkpoint.parent)]) == 0
    assert capsys.readouterr().out == f"{svdq_compile.inspect(checkpoint)}\n"


def test_inspect_json(checkpoint, capsys):
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == svdq_compile.inspect(checkpoint).to_dict()
    formats = collections.Counter(linear["format"] for linear in data["linears"])
    assert formats == {"nvfp4_svd": 6, "nvfp4": 8}
    assert {linear["rank"] for linear in data["linears"]} == {0, 8}


def test_inspect_passes_the_revision_on(monkeypatch):
    seen = {}

    def inspect(path, *, revision):
        seen.update(path=path, revision=revision)
        return ""

    monkeypatch.setattr("svdq_compile.inspection.inspect", inspect)
    assert main(["inspect", "owner/name", "--revision", "v2"]) == 0
    assert seen == {"path": "owner/name", "revision": "v2"}


@pytest.mark.parametrize("compute", ["nvfp4", "fp8", "bf16", "modelopt"])
def test_explain_json(checkpoint, compute, capsys):
    assert main(["explain", str(checkpoint), "--device", "cpu", "--compute", compute, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = data["linears"]
    assert {"real_rope", "insert_linear"} <= data["passes"].keys()
    assert [len(group["names"]) for group in data["groups"] if group["shared"]] == [3, 3, 2]
    assert len(rows) == 14 * SMALL["num_layers"] + 6
    quantised = [row for row in rows if row["format"] != "dense"]
    assert len(quantised) == 14
    assert {row["compute"] for row in quantised} == {compute}
    assert all(row["name"].startswith("transformer_blocks.1.") for row in quantised)


def test_explain_says_what_shares_and_why_not():
    from svdq_compile.testing.random_model import random_transformer

    model = random_transformer(SMALL, recipe="all", rank=8, blocks_kept=0)
    text = str(svdq_compile.explain(model))
    assert "3 x to_q+to_k+to_v: grouped" in text
    assert "3 x img_mod.1+txt_mod.1: apart, txt_mod.1.input_scale differs" in text
    weight = model.transformer_blocks[0].attn.to_q.weight
    model.transformer_blocks[0].attn.to_q.weight = type(weight)(weight.with_share(""), requires_grad=False)
    assert "1 x to_q+to_k+to_v: apart, they could share, but" in str(svdq_compile.explain(model))


def test_explain_shows_the_storage_and_what_auto_means(checkpoint, capsys):
    words = ["explain", str(checkpoint), "--device", "cpu", "--json"]
    nbytes = {}
    for storage, format, compute in (("packed", "nvfp4_svd", "nvfp4"), ("expanded", "fp8_svd", "fp8")):
        assert main([*words, "--storage", storage]) == 0
        rows = json.loads(capsys.readouterr().out)["linears"]
        row = next(row for row in rows if row["rank"])
        assert (row["storage"], row["format"], row["compute"]) == (storage, format, compute)
        nbytes[storage] = row["nbytes"]
    assert nbytes["expanded"] > nbytes["packed"]
    assert main([*words[:-1], "--storage", "expanded"]) == 0
    text = capsys.readouterr().out
    assert "12 x fp8_svd, expanded, compute fp8: reference" in text
    assert "2 x nvfp4, packed, compute nvfp4: reference" in text


def test_a_storage_that_has_not_what_the_mode_needs(checkpoint, capsys):
    words = ["explain", str(checkpoint), "--device", "cpu", "--storage", "expanded", "--compute", "nvfp4"]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: compute='nvfp4' needs the 4-bit codes, which a fp8_svd ")


def test_explain_text(checkpoint, capsys):
    assert main(["explain", str(checkpoint), "--device", "cpu"]) == 0
    model = svdq_compile.load_transformer(checkpoint)
    assert capsys.readouterr().out == f"{svdq_compile.explain(model)}\n"


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there(checkpoint, device, capsys):
    assert main(["explain", str(checkpoint), "--device", device]) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: --device {device}: ")
    assert message.count("\n") == 1
