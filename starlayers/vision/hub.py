"""StarNets as folders and as repositories of the Hugging Face hub."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from starlayers.vision.checkpoints import load_checkpoint
from starlayers.vision.weights import architecture, build, save_weights

if TYPE_CHECKING:
    from typing_extensions import Self

    from starlayers.vision.starnet import StarNet

__all__ = ["OnHub"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class OnHub(nn.Module):
    """Network with the three methods of huggingface_hub's `PyTorchModelHubMixin`.

    `config.json` holds the arguments of the network. Folders need safetensors alone; repositories
    need huggingface_hub, which is asked for when one is named: as a base class its import would
    cost every user of StarNet a third of a second.
    """

    def save_pretrained(self, save_directory: str | os.PathLike[str], **usage: Any) -> None:
        """Write `config.json` and `model.safetensors` to a folder, which is made if missing.

        Args:
            save_directory: the folder.
            usage: `classes`, `mean`, `std` and `size`, as for `save_weights`.

        Raises:
            ValueError: the network was changed in a way that its arguments cannot express.

        Example:
            >>> import tempfile
            >>> from starlayers.vision import StarNet
            >>> folder = tempfile.mkdtemp()
            >>> StarNet(8, (1,), stage_strides=(1,), num_classes=5).save_pretrained(folder)
            >>> StarNet.from_pretrained(folder).stages[0][0].conv.stride
            (1, 1)
        """
        folder = Path(save_directory)
        config = architecture(self)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self, folder / WEIGHTS, **usage)
        partial = folder / f"{CONFIG}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial.replace(folder / CONFIG)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> "Self":
        """Build the network of a folder or a repository of the hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder of `save_pretrained`, or "owner/name" on the hub.
            revision, token, cache_dir, local_files_only: as for `huggingface_hub.hf_hub_download`.
            kwargs: arguments of the network that override those of `config.json`. With another
                `num_classes` it has a fresh head.

        Raises:
            FileNotFoundError: the folder lacks one of the files.
            ValueError: `config.json` is not that of such a network, or the weights do not fit.
            ImportError: a repository is named, and huggingface_hub is not installed.

        Example:
            >>> from starlayers.vision import StarNet
            >>> StarNet.from_pretrained("/no/such/folder/and/repository")
            Traceback (most recent call last):
            ...
            FileNotFoundError: /no/such/folder/and/repository is neither a folder nor owner/name ...
        """
        source = os.fspath(pretrained_model_name_or_path)
        options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        options["local_files_only"] = local_files_only
        config_file, weights = (_file(source, name, options) for name in (CONFIG, WEIGHTS))
        config = json.loads(config_file.read_text())
        if not isinstance(config, dict) or "base_dim" not in config:
            raise ValueError(
                f"{CONFIG} of {source} does not hold the arguments of a {cls.__name__}; build the "
                f"network yourself and pass the file to starlayers.vision.load_checkpoint"
            )
        model = build(cls, config, kwargs)
        load_checkpoint(cast("StarNet", model), weights)
        return model.eval()

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload StarNet",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **usage: Any,
    ) -> str:
        """Upload the files of `save_pretrained` to the hub; the repository is made if missing.

        Args:
            repo_id: "owner/name".
            commit_message, private, token, branch, create_pr: as for
                `huggingface_hub.PyTorchModelHubMixin.push_to_hub`.
            usage: as for `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: as for `save_pretrained`.
            ImportError: huggingface_hub is not installed.
        """
        api = _hub().HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, **usage)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
            )


def _file(source: str, name: str, options: dict[str, Any]) -> Path:
    """Return the local path of a file of a folder or a repository."""
    if Path(source).is_dir():
        path = Path(source, name)
        if not path.is_file():
            raise FileNotFoundError(f"{source} has no {name}; save_pretrained writes one")
        return path
    if (
        source.count("/") > 1
        or source.startswith((".", "/"))
        or (os.sep != "/" and os.sep in source)
    ):
        raise FileNotFoundError(f"{source} is neither a folder nor owner/name of a repository")
    return Path(_hub().hf_hub_download(source, name, **options))


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            "repositories of the hub need huggingface_hub: pip install 'starlayers[vision]'"
        ) from error
    return huggingface_hub
