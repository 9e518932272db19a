"""Settings every test shares."""

import os

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
