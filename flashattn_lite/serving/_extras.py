"""Optional packages: imported where they are used, and named with their remedy when missing."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, *, extra: str = "serve") -> Any:
    """The module, or one sentence that says how to install it.

    Args:
        module: its name.
        extra: of this package, that brings it.

    >>> require("json").dumps([1])
    '[1]'
    >>> require("no_such_package")
    Traceback (most recent call last):
    ImportError: serving needs no_such_package; pip install 'flashattn-lite[serve]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != package:
            raise
        raise ImportError(
            f"serving needs {package}; pip install 'flashattn-lite[{extra}]'", name=package
        ) from None
