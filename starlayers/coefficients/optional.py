"""Check for optional packages at the call that needs them."""

from importlib import import_module


def require(caller: str, module: str, package: str = "", *, extra: str = "coefficients") -> None:
    """Raise an `ImportError` that names the extra if `module` is not installed.

    `caller` is the public function that needs it; it is part of `package`, by default the package
    of that name.
    """
    try:
        import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ImportError(f"{caller} needs {package}: pip install 'starlayers[{extra}]'") from error
