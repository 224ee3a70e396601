"""Guard pages around every tensor: a read or write one element outside one is a crash. Run in child
processes, one for each placement, so that a crash is a failed test with the case's name."""

import os
import subprocess
import sys

import pytest

from flashattn_lite.testing import EDGE_CASES

CHILD = '''
import ctypes, mmap, sys
import torch
from flashattn_lite import attention
from flashattn_lite.testing import EDGE_CASES, gradients_of, make_inputs
from dataclasses import replace

PAGE, PROT_NONE = mmap.PAGESIZE, 0
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
keep = []

def guarded(t, at_end):
    """A copy of t in pages of its own, up against an inaccessible page at its end or its start."""
    t = t.detach().contiguous()
    size = max(1, t.numel() * t.element_size())
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    keep.append(memory)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (begin, begin + (pages + 1) * PAGE):
        assert libc.mprotect(guard, PAGE, PROT_NONE) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    if t.numel() == 0:
        return t
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape)
    copy.copy_(t)
    return copy

def call(*tensors, **options):
    return attention(*tensors, **options, return_lse=True)

at_end = sys.argv[1] == "end"
torch.set_num_threads(1)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for case in EDGE_CASES:
        print(case.name, dtype, flush=True)
        inputs = make_inputs(replace(case, dtype=dtype, strides="contiguous"))
        expected = gradients_of(call, inputs, inputs.options)
        inputs.q, inputs.k, inputs.v = (guarded(t, at_end) for t in (inputs.q, inputs.k, inputs.v))
        inputs.dout, inputs.dlse = guarded(inputs.dout, at_end), guarded(inputs.dlse, at_end)
        inputs.options = {
            n: guarded(o, at_end) if isinstance(o, torch.Tensor) else o
            for n, o in inputs.options.items()
        }
        actual = gradients_of(call, inputs, inputs.options)
        assert torch.equal(actual.out, expected.out)
        for name, gradient in expected.grads.items():
            assert torch.equal(actual.grads[name], gradient), name
print("all", flush=True)
'''


@pytest.mark.parametrize("isa", ["", "avx2", "baseline"])
@pytest.mark.parametrize("side", ["start", "end"])
def test_nothing_outside_a_tensor_is_touched(side: str, isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", CHILD, side],
        env={**os.environ, **({"FAL_CPU_ISA": isa} if isa else {})},
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stdout.strip().splitlines()[-1:]
    assert result.returncode == 0 and last == ["all"], (last, result.returncode, result.stderr)
    assert len(result.stdout.splitlines()) == 3 * len(EDGE_CASES) + 1
