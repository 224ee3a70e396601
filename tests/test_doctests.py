"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import flashattn_lite

MODULES = [
    module.name
    for module in pkgutil.walk_packages(flashattn_lite.__path__, "flashattn_lite.")
    if not module.name.endswith(("__main__", "._C")) and ".integrations." not in module.name
]


@pytest.mark.parametrize("name", ["flashattn_lite", *MODULES])
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_every_public_function_has_an_example() -> None:
    for name in flashattn_lite.__all__:
        public = getattr(flashattn_lite, name)
        if callable(public) and not isinstance(public, type):
            assert ">>>" in (public.__doc__ or ""), name
