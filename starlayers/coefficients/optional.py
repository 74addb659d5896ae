"""What draws or searches needs packages that computing does not: asked for where they are used."""

from importlib import import_module

__all__ = ["needs"]


def needs(owner: str, module: str, package: str = "", *, extra: str = "coefficients") -> None:
    """Raise an `ImportError` that says what to install for `owner` where `module` is not there.

    `package` is what the module is installed as, by default its first part.

    Example:
        >>> needs("this", "no_such_module.part")
        Traceback (most recent call last):
        ImportError: this needs no_such_module: pip install 'starlayers[coefficients]'
    """
    try:
        import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise ImportError(f"{owner} needs {package}: pip install 'starlayers[{extra}]'") from error
