"""Whatever is wrong with a checkpoint: a typed error that names the file, or exactly the unharmed weights."""

import collections
import contextlib
import copy
import faulthandler
import json
import logging
import tempfile
from pathlib import Path

import diffusers
import pytest

import svdq_compile
from svdq_compile.testing.checkpoints import write_checkpoint
from svdq_compile.testing.compare import model_bytes
from svdq_compile.testing.mutations import BASES, catalogue, mutation

CHUNKS, CHUNK = 20, 100
SECONDS = 60
"""A load takes a tenth of a second; one that has not ended after this hangs."""


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """Base name -> what its model holds."""
    folder = tmp_path_factory.mktemp("unharmed")
    return {
        name: model_bytes(svdq_compile.load_transformer(write_checkpoint(folder / name, **arguments)))
        for name, arguments in BASES.items()
    }


@pytest.fixture(scope="module", autouse=True)
def _models_built_once():
    """Models of equal config are copies of one: half of a small load's time is building the model."""
    model_class = diffusers.QwenImageTransformer2DModel
    build, built = model_class.from_config.__func__, {}

    def from_config(cls, config, **options):
        name = json.dumps([config, options], sort_keys=True)
        if name not in built:
            built[name] = build(cls, config, **options)
        return copy.deepcopy(built[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_class, "from_config", classmethod(from_config))
        yield


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@contextlib.contextmanager
def time_limit():
    """Ends the process with a traceback if a load hangs; nothing gentler reaches a loop inside a library."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def verdict(case, unharmed):
    """(outcome, complaint): "loaded" or "refused", and what is wrong with that, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = case.write(Path(name))
        try:
            with time_limit():
                model = svdq_compile.load_transformer(folder)
        except svdq_compile.CheckpointError as error:
            if case.must_load:
                return "refused", f"a neutral edit was refused: {error}"
            if not isinstance(error, case.errors):
                return (
                    "refused",
                    f"{type(error).__name__} instead of {[e.__name__ for e in case.errors]}: {error}",
                )
            if error.file is None or not error.file.startswith(name) or error.file not in str(error):
                return "refused", f"the message does not name the file: {error}"
            return "refused", None
        except Exception as error:
            return "crashed", f"{type(error).__name__}: {error}"
    if not case.may_load:
        return "loaded", "a harmful edit was loaded"
    held, expected = model_bytes(model), unharmed[case.base]
    different = sorted(key for key in held.keys() | expected.keys() if held.get(key) != expected.get(key))
    return "loaded", f"other values in {different[:5]}" if different else None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_typed_error_or_the_same_weights(chunk, unharmed):
    outcomes, complaints = collections.Counter(), []
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        case = mutation(seed)
        outcome, complaint = verdict(case, unharmed)
        outcomes[outcome] += 1
        if complaint:
            complaints.append(f"{case}: {complaint}")
    assert not complaints, "\n".join(complaints)
    assert outcomes["loaded"]
    assert outcomes["refused"]


def test_every_edit_occurs_alone_and_combined():
    alone, combined = collections.Counter(), collections.Counter()
    for seed in range(CHUNKS * CHUNK):
        names = mutation(seed).edits
        (alone if len(names) == 1 else combined).update(names)
    assert alone.keys() == combined.keys() == catalogue().keys()


def test_a_seed_gives_the_same_files_again():
    for seed in range(0, 200, 7):
        first, second = mutation(seed), mutation(seed)
        assert (first.edits, first.files) == (second.edits, second.files)
        assert first != mutation(seed + 2000)


def test_edits_change_the_files():
    """No edit is a no-op, or the tests above would prove nothing for it."""
    from svdq_compile.testing.memory_checkpoints import render
    from svdq_compile.testing.mutations import base_contents

    bases = {name: render(base_contents(name)) for name in BASES}
    same = [str(case) for case in map(mutation, range(CHUNKS * CHUNK)) if case.files == bases[case.base]]
    assert not same
