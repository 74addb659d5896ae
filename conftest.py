"""What every doctest may use without importing it, and where ultralytics may not write."""

import os
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

# read at the import of ultralytics: no network, pip, messages or settings in the home directory
SETTINGS = tempfile.TemporaryDirectory(prefix="starlayers-")
os.environ |= {
    "YOLO_AUTOINSTALL": "false",
    "YOLO_CONFIG_DIR": SETTINGS.name,
    "YOLO_OFFLINE": "true",
    "YOLO_VERBOSE": "false",
}
SAVE, PRINTING = torch.save, np.get_printoptions()


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, object]) -> None:
    torch.manual_seed(0)
    doctest_namespace.update(torch=torch, nn=nn)


@pytest.fixture(autouse=True)
def _without_the_changes_of_ultralytics() -> None:
    """Restore what the import of ultralytics replaces in torch and numpy."""
    torch.save = SAVE
    torch.set_printoptions(profile="default")
    np.set_printoptions(**PRINTING)
