"""Fixtures that several test files share."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from flashattn_lite import _ops

if TYPE_CHECKING:
    from served_model import Server

    from flashattn_lite.serving.tokenizer import Tokenizer

ISAS: list[str] = json.loads(_ops.build_info())["cpu"]["isas"]


# Cases are small: a second thread costs more than it brings, most of all on a machine that does
# other things as well. What depends on the number of threads sets it (test_attention.py).
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor can run, in turn."""
    before = _ops.cpu_isa()
    _ops.set_cpu_isa(request.param)
    yield request.param
    _ops.set_cpu_isa(before)


@pytest.fixture(scope="module")
def tokenizer() -> "Tokenizer":
    """The embedded model's."""
    from flashattn_lite.serving import load_tokenizer
    from flashattn_lite.serving.command import EMBEDDED

    return load_tokenizer(EMBEDDED)


@pytest.fixture(scope="module")
def server() -> Iterator["Server"]:
    """A server on the embedded model, which must have leaked nothing at the end of the file."""
    from served_model import served_model

    with served_model() as found:
        yield found
