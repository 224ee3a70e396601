"""Fixtures that several test files share."""

import json
from collections.abc import Iterator

import pytest
import torch

from flashattn_lite import _ops

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
