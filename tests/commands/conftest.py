"""A trained run that several modules use."""

import pytest
import torch

from starlayers.commands import main
from tests.commands.photos import write_photos


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A short training on 60 photos of all kinds of files."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "photos", 12)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = ["--data", "folder", "--path", str(root / "photos"), "--size", "32", "--epochs", "3"]
    try:
        assert main(["train", *words, "--out", str(root / "run")]) == 0
    finally:
        torch.set_num_threads(threads)
    return root
