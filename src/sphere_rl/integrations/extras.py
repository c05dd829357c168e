"""Libraries that an integration is for: imported there alone, and named in one line where they are missing."""

from __future__ import annotations

from importlib import import_module


def require(module: str, extra: str) -> None:
    """Import a library.

    Raises:
        ImportError: it is not installed; one line with the extra to install.
    """
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name != library:  # it is there, and lacks something itself
            raise
        name = library.replace("_", "-")
        raise ImportError(f"{name} is not installed; pip install 'sphere-rl[{extra}]'", name=library) from None
