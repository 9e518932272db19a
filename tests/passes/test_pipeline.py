"""What all passes have in common: names, reports, dumps, skipping, and the cache key."""

import logging

import pytest
import torch

from svdq_compile.errors import OptionError
from svdq_compile.options import OPTIONAL_PASSES, parse
from svdq_compile.passes.base import SourceKeyed
from svdq_compile.passes.pipeline import PASSES, rewrite, wanted_settings
from svdq_compile.testing.graphs import captured
from svdq_compile.testing.weights import random_linear

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_each_has_a_name_of_its_own_and_says_what_it_does():
    assert len({each.name for each in PASSES}) == len(PASSES)
    assert all(each.does for each in PASSES)
    assert {each.name for each in PASSES if not each.optional} == {"insert_linear"}


def test_a_skipped_pass_does_not_run():
    for name in OPTIONAL_PASSES:
        reports = rewrite(captured(random_linear(32, 48), torch.ones(2, 48).bfloat16()), skip={name})
        assert reports.keys() == {each.name for each in PASSES} - {name}


def test_the_option_is_a_list_of_names():
    ours, _ = parse(None, {"skip_passes": " real_rope ,"})
    assert ours.skipped == {"real_rope"}
    assert parse(None, None)[0].skipped == set()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("real_rop", "no pass \\(did you mean 'real_rope'\\?\\); optional: attention_layout"),
        ("insert_linear", "left out"),
    ],
)
def test_other_names_are_refused(value, message):
    with pytest.raises(OptionError, match=message):
        parse(None, {"skip_passes": value})


def test_skipping_is_part_of_the_cache_key():
    keys = {SourceKeyed(None, 0, skipped).uuid() for skipped in ((), ("a",), ("b",), ("a", "b"))}
    assert len(keys) == 4
    assert SourceKeyed(None, 0, ("a", "b")).uuid() == SourceKeyed(None, 3, ("b", "a")).uuid()


def test_settings_are_raised_only_where_a_pass_found_something():
    found = rewrite(captured(_rotate, torch.ones(2, 4), torch.ones(2, dtype=torch.complex64)))
    assert wanted_settings(found, {}) == {"realize_opcount_threshold": 64}
    assert wanted_settings(found, {"realize_opcount_threshold": 10}) == {}
    nothing = rewrite(captured(torch.sin, torch.ones(2)))
    assert wanted_settings(nothing, {}) == {}


def test_the_dump_shows_both_graphs(caplog):
    caplog.set_level(logging.DEBUG, logger="svdq_compile")
    rewrite(captured(_rotate, torch.ones(2, 4), torch.ones(2, dtype=torch.complex64)))
    (dump,) = (record.getMessage() for record in caplog.records if "before real_rope" in record.getMessage())
    before, after = dump.split("\nafter:\n")
    assert "view_as_complex" in before
    assert "view_as_complex" not in after
    assert "real_rope: 1 rewritten, 0 left" in after


def _rotate(x, table):
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * table)
