"""Settings every test shares."""

import gc
import os
import pathlib
import tempfile

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_report_header() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__}, {gpu}, CPU capability {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(autouse=True)
def _inference():
    """What a pipeline's call does."""
    with torch.no_grad():
        yield


@pytest.fixture
def fresh_dynamo():
    """Compile counts start at zero, and nothing compiled stays behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def gpu_memory():
    """``gpu_memory(gib)`` skips on a GPU with less; of all processes, one test that takes this fixture runs at a time.

    Whether a test runs does not depend on what other processes have taken.
    """
    import fcntl

    def need(gib: int) -> None:
        if torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory < gib << 30:
            pytest.skip(f"needs {gib} GiB of GPU memory")

    with pathlib.Path(tempfile.gettempdir(), f"svdq-compile-gpu-memory-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield need
        gc.collect()
        torch.cuda.empty_cache()
