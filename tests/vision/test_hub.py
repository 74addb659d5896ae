"""Folders, repositories of the Hugging Face hub, and torch.hub."""

import importlib.util
import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin

from starlayers import vision
from starlayers.coefficients.modules import RankStarMLP
from starlayers.vision import STARNETS, StarNet, architecture, read_metadata

from .util import assert_same_tensors, image, snapshot, tiny

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options",
    [{}, {"stage_strides": (1, 2), "kernel_size": 3, "in_chans": 1}, {"mlp_layer": RankStarMLP}],
    ids=["defaults", "strides", "rank"],
)
def test_a_folder_gives_the_network_back(options, tmp_path):
    model = tiny(1, **options).train()
    model.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {f.name for f in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text()) == architecture(model)
    again, x = StarNet.from_pretrained(str(folder)), image(2, model.in_chans, 20, 20)
    assert (type(again), again.training) == (StarNet, False)
    assert_same_tensors(snapshot(again), snapshot(model))
    torch.testing.assert_close(again(x), model.eval()(x), rtol=0, atol=0)


def test_arguments_and_the_description_of_images_go_with_it(tmp_path):
    usage = {"classes": [str(i) for i in range(10)], "mean": [0.5] * 3, "std": [0.2] * 3}
    tiny(1).save_pretrained(tmp_path, **usage, size=32)
    metadata = read_metadata(tmp_path / "model.safetensors")
    assert {k: metadata[k] for k in (*usage, "size")} == {**usage, "size": [32, 32]}
    model = StarNet.from_pretrained(tmp_path, num_classes=3, drop_rate=0.1)
    assert (model.head.out_features, model.drop_rate) == (3, 0.1)
    assert torch.equal(model.norm.weight, tiny(1).norm.weight)


def test_a_fused_network_is_saved_as_it_is(tmp_path):
    model, x = tiny(1).fuse(), image(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(StarNet.from_pretrained(tmp_path)(x), model(x), rtol=0, atol=0)


class Own(StarNet):
    """Class of a user."""


def test_a_subclass_is_built_by_its_own_class(tmp_path):
    model = Own(4, (1,), stage_strides=(2,), num_classes=2)
    model.save_pretrained(tmp_path)
    assert type(Own.from_pretrained(tmp_path)) is Own


def test_a_repository_is_downloaded_file_by_file(tmp_path, monkeypatch):
    tiny(1).save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options))
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = StarNet.from_pretrained("me/flowers", revision="v1", token="t", local_files_only=True)
    assert_same_tensors(snapshot(model), snapshot(tiny(1)))
    options = {"revision": "v1", "token": "t", "cache_dir": None, "local_files_only": True}
    assert asked == [("me/flowers", name, options) for name in ("config.json", "model.safetensors")]


def test_a_push_uploads_the_folder(monkeypatch):
    model, calls = tiny(1), {}

    class Api:
        def __init__(self, token):
            calls["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            calls["repository"] = repo_id, private, exist_ok
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, folder_path, **options):
            again = StarNet.from_pretrained(folder_path)
            assert_same_tensors(snapshot(again), snapshot(model))
            calls["upload"] = options
            return "https://address/of/the/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    address = model.push_to_hub("flowers", private=True, token="t", branch="b", commit_message="m")
    assert address == "https://address/of/the/commit"
    upload = {"repo_id": "me/flowers", "commit_message": "m", "revision": "b", "create_pr": None}
    assert calls == {"token": "t", "repository": ("flowers", True, True), "upload": upload}


def test_methods_are_called_as_the_mixins_of_huggingface_hub():
    for name in ("save_pretrained", "from_pretrained", "push_to_hub"):
        assert callable(getattr(PyTorchModelHubMixin, name))
        assert callable(getattr(StarNet, name))


def test_the_mixin_itself_still_fits_into_a_subclass(tmp_path):
    class Shared(StarNet, PyTorchModelHubMixin, library_name="starlayers"):
        pass

    model = Shared(4, (1,), stage_strides=(1,), num_classes=2)
    model.save_pretrained(tmp_path)
    assert_same_tensors(snapshot(Shared.from_pretrained(tmp_path)), snapshot(model))
    assert len(pickle.dumps(StarNet(4, (1,), stage_strides=(1,)))) > 0


# --- what is refused


def test_errors_name_the_folder_and_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/no/such is neither a folder nor owner/name"):
        StarNet.from_pretrained("/no/such")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json; save_pretrained writes one"):
        StarNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "starnet_s1"}')
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        StarNet.from_pretrained(tmp_path)
    tiny(1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "starnet_s1"}')
    with pytest.raises(
        ValueError, match=r"config.json of .* does not hold the arguments of a Star"
    ):
        StarNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(architecture(tiny(1)) | {"kernel_size": 3}))
    with pytest.raises(ValueError, match="kernel_size is 7 in the file and 3 in the model"):
        StarNet.from_pretrained(tmp_path)


def test_a_changed_network_is_not_saved_as_a_folder(tmp_path):
    model = tiny(1)
    model.stages[0].append(torch.nn.Identity())
    with pytest.raises(ValueError, match="changed after it was made"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_huggingface_hub_folders_work_and_repositories_name_the_extra(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    tiny(1).save_pretrained(tmp_path)
    StarNet.from_pretrained(tmp_path)
    for call in (lambda: StarNet.from_pretrained("me/x"), lambda: tiny(1).push_to_hub("me/x")):
        with pytest.raises(ImportError, match=r"huggingface_hub: pip install 'starlayers\[vision"):
            call()


# --- torch.hub


@pytest.mark.parametrize("name", STARNETS)
def test_torch_hub_builds_every_network(name):
    model = torch.hub.load(str(ROOT), name, source="local", num_classes=7, device="meta")
    assert type(model) is StarNet
    assert architecture(model) == architecture(getattr(vision, name)(num_classes=7, device="meta"))


def test_torch_hub_names_the_networks_and_nothing_else():
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    entries = {n for n, f in vars(hubconf).items() if callable(f) and not n.startswith("_")}
    assert entries == set(hubconf.__all__) == set(STARNETS)
    assert all(importlib.util.find_spec(name) for name in hubconf.dependencies)
