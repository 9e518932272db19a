"""Forwards with and without a part in turns: the order, and what is made of it."""

import types

import pytest
import torch

from svdq_compile.bench import forward_models, in_turns
from svdq_compile.bench.forward_measure import Run
from svdq_compile.bench.forward_models import Contender
from svdq_compile.bench.forward_plan import ForwardPlan
from svdq_compile.bench.in_turns import FORWARDS, Turns, against_plain, turns_table
from svdq_compile.ops.weight import SVDQWeight


def test_turns_begin_with_another_one_every_round(monkeypatch):
    calls = []
    monkeypatch.setattr(
        in_turns, "time_forward", lambda forward, device, repeats, **_: calls.append(forward) or [1.0] * repeats
    )
    run = types.SimpleNamespace(plan=types.SimpleNamespace(repeats=3), device=torch.device("cpu"))
    samples = in_turns._samples(run, ["with", "without"])
    assert calls == ["with", "without", "with", "without", "without", "with", "with", "without"]
    assert [len(each) for each in samples] == [3 * FORWARDS] * 2


@pytest.mark.parametrize("off", [{"low_rank": False}, {"skipped": "real_rope"}], ids=["rank 0", "no real_rope"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_two_models_that_differ_in_what_is_switched_off(monkeypatch, off):
    compiled = []

    def compile_model(model, contender, plan):
        low_rank = any(isinstance(each, SVDQWeight) and each.spec.has_low_rank for each in model.parameters())
        compiled.append({"low_rank": low_rank, "skipped": contender.skipped})
        return model

    monkeypatch.setattr(forward_models, "compile_model", compile_model)
    plan = ForwardPlan(sizes=((64, 48), (32, 32)), text=5, blocks=2, rank=8, repeats=1).on("cpu")
    run = Run(plan, torch.device("cpu"), None, None)
    found = list(against_plain(run, Contender("svdq", "fp8", "packed", **off)))
    everything = {"low_rank": True, "skipped": ""}
    assert compiled == [everything, everything | off]
    assert [turns.size for turns in found] == ["64x48", "32x32"]
    assert all(turns.plain_ms > 0 and turns.variant_ms > 0 for turns in found)


def test_changes_are_shares_of_the_forward_with_everything():
    cheaper, dearer = Turns("64x48", "svdq fp8 packed rank 0", 100.0, 97.0), Turns("64x48", "no modulate", 80.0, 84.0)
    assert (cheaper.percent, dearer.percent) == (-3.0, 5.0)
    title, *lines = turns_table([cheaper, dearer]).splitlines()
    assert [line.split()[-4:] for line in lines] == [
        ["100.00", "97.00", "-3.00", "-3.0"],
        ["80.00", "84.00", "4.00", "5.0"],
    ]
    assert {len(line) for line in lines} == {len(title)}
    assert turns_table([]) == ""
