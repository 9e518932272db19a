"""Forwards with and without low-rank branches in turns: the order, and what is made of it."""

import types

import torch

from svdq_compile.bench import in_turns
from svdq_compile.bench.in_turns import FORWARDS, Turns, turns_table


def test_turns_begin_with_another_one_every_round(monkeypatch):
    calls = []
    monkeypatch.setattr(
        in_turns, "time_forward", lambda forward, device, repeats, **_: calls.append(forward) or [1.0] * repeats
    )
    run = types.SimpleNamespace(plan=types.SimpleNamespace(repeats=3), device=torch.device("cpu"))
    samples = in_turns._samples(run, ["with", "without"])
    assert calls == ["with", "without", "with", "without", "without", "with", "with", "without"]
    assert [len(each) for each in samples] == [3 * FORWARDS] * 2


def test_the_share_is_of_the_forward_with_branches():
    turns = Turns("64x48", "svdq fp8 packed", 100.0, 97.0)
    assert turns.percent == 3.0
    assert turns_table([turns]).splitlines()[1].split() == ["64x48", "svdq", "fp8", "packed", "100.00", "97.00", "3.0"]
    assert turns_table([]) == ""
