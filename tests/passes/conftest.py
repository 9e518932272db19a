"""What the tests of passes that join two streams share."""

import pytest


@pytest.fixture
def on_an_h100(monkeypatch):
    """The passes believe that CPU tensors are on one; what they insert runs as its specification."""
    for module in ("ops.cuda", "passes.joint_heads", "passes.joint_linear"):
        monkeypatch.setattr(f"svdq_compile.{module}.capability", lambda device: (9, 0))
