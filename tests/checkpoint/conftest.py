"""What the tests of reading and writing checkpoints share."""

import pytest

import svdq_compile
from svdq_compile.testing.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def _no_progress_bars():
    """Bars of thousands of loads would bury the tests' output."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def checkpoint(tmp_path):
    """A mixed BF16 checkpoint in one file."""
    return write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path):
    """The same in three files with an index."""
    return write_checkpoint(tmp_path / "sharded", shards=3)


@pytest.fixture
def load_error():
    """Loads a path that must fail, and returns the error."""

    def load(path, error_class=svdq_compile.CheckpointError, **options):
        with pytest.raises(error_class) as caught:
            svdq_compile.load_transformer(path, **options)
        return caught.value

    return load
