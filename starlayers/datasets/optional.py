"""Imports of the packages that the extra `datasets` installs."""

import importlib
from typing import Any

__all__ = ["require"]


def require(module: str, extra: str = "datasets") -> Any:
    """Import an optional package, or say how to install it.

    Args:
        module: dotted name of the module.
        extra: extra of starlayers that brings it.

    Raises:
        ImportError: the package is not installed; the message names the extra.

    Example:
        >>> require("json").loads("[1, 2]")
        [1, 2]
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"starlayers.datasets needs {package}: pip install 'starlayers[{extra}]'"
        ) from error
