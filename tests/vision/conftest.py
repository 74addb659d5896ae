import pytest

import starlayers.backend


@pytest.fixture
def fuse_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the fused op take activations of any size."""
    monkeypatch.setattr(starlayers.backend, "MIN_HIDDEN_BYTES_INFERENCE", 0)
    monkeypatch.setattr(starlayers.backend, "MIN_HIDDEN_BYTES_TRAINING", 0)
