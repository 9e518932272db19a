"""A pipeline, or something else, where a model is needed."""

import types

import pytest

import svdq_compile
from svdq_compile.errors import ModelError

CALLS = {
    "load_into": lambda given: svdq_compile.load_into(given, "nowhere"),
    "patch": lambda given: svdq_compile.patch(given, "nowhere").__enter__(),
    "capture": svdq_compile.capture,
    "explain": svdq_compile.explain,
    "set_compute": lambda given: svdq_compile.set_compute(given, "fp8"),
    "save_checkpoint": lambda given: svdq_compile.save_checkpoint(given, "nowhere"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_says_what_to_give(call):
    with pytest.raises(ModelError, match=r"SimpleNamespace is no model\n.*\.transformer"):
        call(types.SimpleNamespace(transformer=None))
    with pytest.raises(ModelError, match="int is no model"):
        call(3)
