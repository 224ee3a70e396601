"""Fixtures that several test files share."""

import json
from collections.abc import Iterator

import pytest
import torch

from flashattn_lite import _ops

ISAS: list[str] = json.loads(_ops.build_info())["cpu"]["isas"]


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
