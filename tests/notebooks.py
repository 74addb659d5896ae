"""Remove from executed notebooks what differs between two runs or is of no use to a reader.

`make notebooks-save` executes the notebooks, keeps their outputs, and calls this.
"""

import json
import sys
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def cleaned(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return the notebook without times, with one piece of text a stream, and without its log."""
    cells = []
    for cell in notebook["cells"]:
        cell = {**cell, "metadata": {}}
        if cell["cell_type"] == "code":
            cell["outputs"] = _joined(cell["outputs"])
        cells.append(cell)
    return {**notebook, "cells": cells}


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stderr":  # bars and logs
                continue
            if kept and kept[-1]["output_type"] == "stream":
                kept[-1] = {**kept[-1], "text": [*kept[-1]["text"], *output["text"]]}
                continue
        kept.append({**output, "metadata": {}} if "metadata" in output else output)
    return kept


def main() -> int:
    """Clean the notebooks in place."""
    for file in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = cleaned(json.loads(file.read_text()))
        file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
