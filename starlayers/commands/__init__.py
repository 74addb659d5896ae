"""Command `starlayers`: facts for bug reports, and image classifiers without writing Python.

starlayers info
starlayers train --data folder --path photos
starlayers predict runs/TIME photo.jpg
starlayers export runs/TIME --format openvino
"""

import argparse
import json
import sys
from collections.abc import Sequence

from starlayers.info import as_text, collect

__all__ = ["main"]

#: command -> its line in the help; those but `info` need the extras `training` and `datasets`
COMMANDS = {
    "info": "versions, devices, code paths and models",
    "train": "train a StarNet on images",
    "eval": "test a trained network on the images of its run, or on others",
    "predict": "name the classes of image files",
    "export": "write a trained network as ONNX, OpenVINO and others",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `starlayers` command and return its exit status.

    `starlayers info` prints `collect()` as text, `starlayers info --json` as JSON. Each command
    describes its own options with `--help`.

    Args:
        arguments: words of the command line; default those of the process.

    Raises:
        SystemExit: the words are no command, or ask for help.
        ImportError: a command whose extra is not installed; the message names the extra.

    Example:
        >>> main(["info"])  # doctest: +ELLIPSIS
        packages
          python ...
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="starlayers", description="Star layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        # the commands of a room read their own options, so that help on others needs no extra
        commands.add_parser(name, help=line, add_help=False)
    command = parser.parse_args(words[:1]).command
    if command == "info":
        return _info(words[1:])
    from starlayers.commands import vision  # needs the extras

    return vision.run(command, words[1:])


def _info(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="starlayers info", description=COMMANDS["info"])
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    options = parser.parse_args(words)
    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else as_text(facts))
    return 0
