"""use_as_sdpa: this library in the place of torch's scaled_dot_product_attention, for a while, for
a thread, nested."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from flashattn_lite import ArgumentError, attention
from flashattn_lite.sdpa import scaled_dot_product_attention, use_as_sdpa

TORCH_SDPA = functional.scaled_dot_product_attention


def call(head_dim: int = 8, rows: int = 4) -> Tensor:
    t = torch.ones(1, 2, rows, head_dim)
    return functional.scaled_dot_product_attention(t, t, t)


def test_use_as_sdpa_replaces_and_restores() -> None:
    with use_as_sdpa() as calls:
        assert functional.scaled_dot_product_attention is not TORCH_SDPA
        q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 9, 8)
        out = functional.scaled_dot_product_attention(
            q, k, k, is_causal=True, scale=0.5, enable_gqa=True
        )
    assert functional.scaled_dot_product_attention is TORCH_SDPA
    assert calls.ours == 1 and not calls.torch
    torch.testing.assert_close(out, TORCH_SDPA(q, k, k, is_causal=True, scale=0.5, enable_gqa=True))


def test_nesting_counts_in_the_innermost() -> None:
    with use_as_sdpa() as outer:
        call()
        with use_as_sdpa() as inner:
            call()
        call()
    assert (outer.ours, inner.ours) == (2, 1)
    assert functional.scaled_dot_product_attention is TORCH_SDPA


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_as_sdpa():
        raise KeyError
    assert functional.scaled_dot_product_attention is TORCH_SDPA


def test_other_threads_keep_torchs() -> None:
    counts = []
    inside, done = threading.Barrier(2), threading.Barrier(2)

    def uses() -> None:
        with use_as_sdpa() as calls:
            inside.wait()
            call()
            done.wait()
            counts.append(calls.ours)

    thread = threading.Thread(target=uses)
    thread.start()
    inside.wait()
    assert functional.scaled_dot_product_attention is not TORCH_SDPA  # installed, but not for us
    call()
    done.wait()
    thread.join()
    assert counts == [1]
    assert functional.scaled_dot_product_attention is TORCH_SDPA


def test_all_threads_reaches_them() -> None:
    with use_as_sdpa(all_threads=True) as calls:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        call()
    assert calls.ours == 2


def test_threads_that_overlap_leave_torchs_behind() -> None:
    def work(_: int) -> None:
        for _ in range(30):
            with use_as_sdpa() as calls:
                call()
            assert calls.ours == 1

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert functional.scaled_dot_product_attention is TORCH_SDPA


def test_asyncio_tasks_are_apart() -> None:
    async def uses(started: asyncio.Event, other: asyncio.Event) -> int:
        with use_as_sdpa() as calls:
            started.set()
            await other.wait()
            call()
        return calls.ours

    async def both() -> int:
        started, other = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(uses(started, other))
        await started.wait()
        call()  # torch's, for this task has not entered
        other.set()
        return await task

    assert asyncio.run(both()) == 1


def test_what_cannot_run_raises_or_is_counted() -> None:
    with use_as_sdpa(), pytest.raises(ArgumentError, match="head_dim 300; it must be 1 to 256"):
        call(300, 9)
    with use_as_sdpa(unsupported="torch") as calls:
        out = call(300, 9)
        call()
    assert torch.equal(out, torch.ones(1, 2, 9, 300))
    assert calls.ours == 1 and calls.torch == {"query has head_dim 300; it must be 1 to 256": 1}
    nested = torch.nested.nested_tensor([torch.ones(2, 3, 8), torch.ones(2, 5, 8)])
    with use_as_sdpa(), pytest.raises(ArgumentError, match="nested tensors cannot run on"):
        functional.scaled_dot_product_attention(nested, nested, nested)


class Subclass(torch.Tensor):
    pass


def test_tensor_subclasses_stay_with_torch() -> None:
    t = torch.ones(1, 2, 4, 8).as_subclass(Subclass)
    with use_as_sdpa(), pytest.raises(ArgumentError, match="tensor subclass Subclass cannot run"):
        functional.scaled_dot_product_attention(t, t, t)
    with use_as_sdpa(unsupported="torch") as calls:
        assert type(functional.scaled_dot_product_attention(t, t, t)) is Subclass
    assert calls.torch == {"tensor subclass Subclass": 1} and not calls.ours


@pytest.mark.parametrize(("head_dim", "ours"), [(8, 1), (300, 0)])
def test_a_causal_bias_is_right_whoever_computes(head_dim: int, ours: int) -> None:
    """It looks for its function in torch.nn.functional, where another one stands."""
    q, k = torch.randn(1, 2, 9, head_dim), torch.randn(1, 2, 12, head_dim)
    found: list[Tensor] = []

    def compute() -> None:
        bias = causal_lower_right(9, 12)
        found.append(functional.scaled_dot_product_attention(q, k, k, bias))

    with use_as_sdpa(unsupported="torch") as calls:
        compute()
        thread = threading.Thread(target=compute)  # torch's, for it has not entered
        thread.start()
        thread.join()
    assert (calls.ours, calls.torch.total()) == (ours, 1 - ours)
    truth = TORCH_SDPA(q, k, k, torch.ones(9, 12, dtype=torch.bool).tril(3))
    assert len(found) == 2
    for out in found:
        torch.testing.assert_close(out, truth)


def test_a_wrong_policy_is_refused() -> None:
    with (
        pytest.raises(ArgumentError, match="unsupported is 'ignore'"),
        use_as_sdpa(
            unsupported="ignore"  # type: ignore[arg-type]
        ),
    ):
        pass


def test_torchs_own_modules_are_reached() -> None:
    mha = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    expected, _ = mha(x, x, x, need_weights=False)
    with use_as_sdpa() as calls:
        out, _ = mha(x, x, x, need_weights=False)
    assert calls.ours == 1
    torch.testing.assert_close(out, expected)


def test_sdpa_is_attention_transposed() -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    out = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    assert torch.equal(out.transpose(1, 2), attention(q, k, v))


def test_use_as_sdpa_holds_in_compiled_code() -> None:
    compiled = torch.compile(call, backend="eager")
    with use_as_sdpa() as calls:
        out = compiled()
    assert calls.ours == 1
    assert torch.equal(compiled(), out)  # torch's again: the values are all ones
    assert calls.ours == 1
