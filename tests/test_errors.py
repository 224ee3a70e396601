"""The error contract (docs/semantics.md, "Errors"): each rule, by the function that people call,
with the argument, its value, and what would be right. Nothing bad is accepted silently."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flashattn_lite
from flashattn_lite import ArgumentError, attention, flash_attn_func, flash_attn_varlen_func
from flashattn_lite import attention_weights as weights


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def qkv(**changes: Any) -> dict[str, Any]:
    """Arguments of a good call, some of them changed."""
    tensors = {n: torch.randn(2, 6, 4, 8) for n in "qkv"}
    return tensors | changes


def varlen(**changes: Any) -> dict[str, Any]:
    good = {n: torch.randn(64, 4, 8) for n in "qkv"}
    good |= {"cu_seqlens_q": ints(0, 32, 64), "cu_seqlens_k": ints(0, 32, 64)}
    return good | {"max_seqlen_q": 32, "max_seqlen_k": 32} | changes


def paged(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {"q": torch.randn(2, 3, 4, 8)}
    good |= {n: torch.randn(5, 4, 4, 8) for n in "kv"}
    good |= {"block_table": ints(0, 1, 2, 3).reshape(2, 2), "seqused_k": ints(8, 5)}
    return good | changes


R = torch.randn
BAD: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    # dtypes
    (attention, qkv(q=R(2, 6, 4, 8).int()), "q is int32; it must be float32, float16 or bfloat16"),
    (attention, qkv(k=R(2, 6, 4, 8).half()), "k is float16 but v is float32; they must agree"),
    (attention, qkv(q=R(2, 6, 4, 8).half()), "k and v are float32 but q is float16"),
    (attention, qkv(sinks=R(4).int()), "sinks is int32; it must be"),
    (attention, qkv(alibi_slopes=R(4).half()), "alibi_slopes is float16; it must be float32"),
    (attention, qkv(bias=torch.ones(6, 6, dtype=torch.bool)), "bias is bool; it must be"),
    (attention, qkv(bias=R(6, 6).double()), "bias is float64; it must be"),
    (attention, varlen(cu_seqlens_q=ints(0, 32, 64).long()), "cu_seqlens_q is int64; it must be"),
    (attention, qkv(seqused_k=torch.tensor([1, 2])), "seqused_k is int64; it must be int32"),
    (attention, paged(block_table=torch.zeros(2, 2)), "block_table is float32; it must be int32"),
    (attention, qkv(dropout_p=0.1, dropout_seed=ints(3)), "dropout_seed must be one int64"),
    # shapes
    (attention, qkv(q=R(6, 4, 8)), "q has shape (6, 4, 8); it must be (batch, seqlen_q, heads_q"),
    (attention, varlen(q=R(2, 32, 4, 8)), "because cu_seqlens_q is given"),
    (attention, qkv(k=R(2, 6, 4)), "k has shape (2, 6, 4); it must be (batch, seqlen_k, heads_k"),
    (attention, qkv(v=R(2, 7, 4, 8)), "k has shape (2, 6, 4, 8) but v has (2, 7, 4, 8)"),
    (attention, qkv(v=R(2, 6, 2, 8)), "v has (2, 6, 2, 8); only head_dim may differ"),
    (attention, varlen(v=R(64, 2, 8)), "v has (64, 2, 8); only head_dim may differ"),
    (attention, qkv(q=R(2, 6, 4, 9)), "k has head_dim 8 but q has 9"),
    (attention, qkv(q=R(3, 6, 4, 8)), "k has batch 2 but q has batch 3"),
    (attention, qkv(q=R(2, 6, 6, 8)), "q has 6 heads but k has 4; heads_q must be a multiple of"),
    (attention, {n: R(1, 9, 1, 257) for n in "qkv"}, "q has head_dim 257; it must be 1 to 256"),
    (attention, {n: R(1, 2, 1, 577) for n in "qkv"}, "q has head_dim 577; it must be 1 to 576"),
    (attention, {n: R(1, 9, 1, 0) for n in "qkv"}, "q has head_dim 0; it must be 1 to 256"),
    (attention, qkv(sinks=R(3)), "sinks has shape (3,); it must be (4,)"),
    (
        attention,
        qkv(alibi_slopes=R(3, 4)),
        "alibi_slopes has shape (3, 4); it must be (4,) or (2, 4)",
    ),
    (attention, qkv(bias=R(6, 5)), "must broadcast to (2, 4, 6, 6)"),
    (attention, qkv(seqused_q=ints(1, 2, 3)), "seqused_q has shape (3,); it must be (2,)"),
    (attention, varlen(cu_seqlens_k=ints(0, 64)), "cu_seqlens_k has 2 entries; with batch 2"),
    (attention, varlen(cu_seqlens_q=ints()), "cu_seqlens_q is empty"),
    (
        attention,
        paged(block_table=ints(0, 1)),
        "block_table has shape (2,); it must be (2, max_pages)",
    ),
    (attention, paged(k=R(5, 0, 4, 8), v=R(5, 0, 4, 8)), "page"),
    (attention, paged(seqused_k=None), "block_table needs seqused_k"),
    # contents of index tensors
    (
        attention,
        varlen(cu_seqlens_q=ints(1, 32, 64)),
        "cu_seqlens_q starts at 1; it must start at 0",
    ),
    (
        attention,
        varlen(cu_seqlens_q=ints(0, 40, 30)),
        "cu_seqlens_q falls from 40 to 30 at entry 2",
    ),
    (flash_attn_varlen_func, varlen(cu_seqlens_k=ints(0, 32, 96)), "cu_seqlens_k ends at 96 but k"),
    (attention, varlen(cu_seqlens_k=ints(0, -5, 64)), "cu_seqlens_k falls from 0 to -5"),
    (
        attention,
        varlen(max_seqlen_q=31),
        "max_seqlen_q is 31 but sequence 0 of cu_seqlens_q has 32",
    ),
    (attention, qkv(seqused_k=ints(6, 7)), "seqused_k[1] is 7; it must be 0 to 6"),
    (attention, qkv(seqused_q=ints(-1, 2)), "seqused_q[0] is -1; it must be 0 to 6"),
    (attention, qkv(leftpad_k=ints(0, 9)), "leftpad_k[1] is 9; it must be 0 to 6"),
    *(
        (
            attention,
            varlen(**{cu: ints(0, 20, 64), longest: 44, given: ints(21, 44)}),
            f"{given}[0] is 21; it must be 0 to 20",
        )
        for given, cu, longest in (
            ("seqused_q", "cu_seqlens_q", "max_seqlen_q"),
            ("seqused_k", "cu_seqlens_k", "max_seqlen_k"),
            ("leftpad_k", "cu_seqlens_k", "max_seqlen_k"),
        )
    ),
    (
        attention,
        paged(block_table=ints(0, 1, 2, 5).reshape(2, 2)),
        "block_table[1, 1] is 5 but",
    ),
    (
        attention,
        paged(block_table=ints(0, -1, 2, 3).reshape(2, 2)),
        "block_table[0, 1] is -1 but",
    ),
    (
        attention,
        paged(seqused_k=ints(8, 9)),
        "more than block_table can address: 2 pages of 4 tokens",
    ),
    (attention, qkv(bias=R(5, 1, 1, 1)), "bias has shape (5, 1, 1, 1); it must broadcast to"),
    (attention, qkv(bias=R(3, 1, 1)), "bias has shape (1, 3, 1, 1); it must broadcast to"),
    # numbers
    (attention, qkv(dropout_p=1.0), "dropout_p is 1; it must be in [0, 1)"),
    (attention, qkv(dropout_p=-0.1), "dropout_p is -0.1; it must be in [0, 1)"),
    (flash_attn_func, qkv(dropout_p=1.5), "dropout_p is 1.5; it must be in [0, 1)"),
    (attention, qkv(softcap=-1.0), "softcap is -1; it must be >= 0"),
    (attention, qkv(softcap=float("nan")), "softcap is nan; it must be >= 0"),
    (attention, qkv(softmax_scale=float("inf")), "softmax_scale is inf; it must be finite"),
    (attention, qkv(softmax_scale=1e39), "softmax_scale is 1e+39; it must be finite in float32"),
    (attention, qkv(softcap=1e39), "softcap is 1e+39; it must be 0 (off) or 1e-30 to 1e30"),
    (attention, qkv(softcap=1e-46), "softcap is 1e-46; it must be 0 (off) or 1e-30 to 1e30"),
    (attention, qkv(window=(-2, 0)), "window is (-2, 0); a side must be >= 0, or None or -1"),
]


@pytest.mark.parametrize(
    ("function", "arguments", "text"), BAD, ids=[re.sub(r"\W+", "_", b[2])[:60] for b in BAD]
)
def test_a_bad_argument_is_named(
    function: Callable[..., Any], arguments: dict[str, Any], text: str
) -> None:
    if function is flash_attn_func:
        arguments = {n: a for n, a in arguments.items() if a is not None}
    with pytest.raises(ArgumentError) as raised:
        function(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{function.__name__}: "), message
    assert text in message


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(a, t) for f, a, t in BAD if f is attention and a["q"].is_floating_point()],
    ids=[
        re.sub(r"\W+", "_", t)[:60]
        for f, a, t in BAD
        if f is attention and a["q"].is_floating_point()
    ],
)
def test_the_reference_path_refuses_the_same(arguments: dict[str, Any], text: str) -> None:
    """float64 goes through the reference: what the operator refuses must be refused there too,
    except what the reference can compute."""
    legal = (
        "head_dim 257",
        "head_dim 577",
        "bias is float64",
        "alibi_slopes is float16",
        "max_seqlen_q is 31",
        "finite in float32",
        "0 (off) or",
    )
    if any(part in text for part in legal):
        attention(**arguments, backend="reference")
        return
    with pytest.raises(ArgumentError, match=r"^attention: "):
        attention(**arguments, backend="reference")


def test_wrong_types_are_type_errors() -> None:
    q = R(1, 2, 1, 4)
    for call in (
        lambda: attention(q.tolist(), q, q),
        lambda: flash_attn_func(q, q, None),
        lambda: attention(q, q, q, softcap="high"),
        lambda: attention(q, q, q, cu_seqlens_q=[0, 1]),
        lambda: attention(q, q, q, window=3),
        lambda: attention(q, q, q, window=("a", 1)),
        lambda: flash_attn_func(q, q, q, window_size=5),
    ):
        with pytest.raises(TypeError, match=r"^(attention|flash_attn_func): "):
            call()


def test_peers_catch_runtime_errors() -> None:
    q = R(1, 2, 1, 4)
    with pytest.raises(RuntimeError):
        flash_attn_func(q, R(1, 2, 3, 4), R(1, 2, 3, 4))
    with pytest.raises(ValueError):
        flash_attn_func(q, R(1, 2, 3, 4), R(1, 2, 3, 4))


def test_the_errors_of_a_backward_name_the_function() -> None:
    q = R(1, 2, 1, 4, requires_grad=True)
    out = attention(q, q, q, name="my_attention")
    with pytest.raises(RuntimeError, match="shape"):
        torch.autograd.grad(out, q, R(1, 2, 1, 5))


def test_packed_shapes_are_checked() -> None:
    for function, arguments, text in (
        ("flash_attn_qkvpacked_func", (R(2, 6, 4, 4, 8),), "qkv has shape (2, 6, 4, 4, 8)"),
        ("flash_attn_kvpacked_func", (R(2, 6, 4, 8), R(2, 6, 3, 4, 8)), "kv has shape"),
        (
            "flash_attn_varlen_qkvpacked_func",
            (R(6, 4, 8), ints(0, 6), 6),
            "qkv has shape (6, 4, 8)",
        ),
        (
            "flash_attn_varlen_kvpacked_func",
            (R(6, 4, 8), R(6, 4, 8), ints(0, 6), ints(0, 6), 6, 6),
            "kv has shape (6, 4, 8); it must be (total, 2, heads, head_dim)",
        ),
    ):
        with pytest.raises(ArgumentError, match=re.escape(f"{function}: {text}")):
            getattr(flashattn_lite, function)(*arguments)


def test_meta_and_mixed_devices() -> None:
    q = R(1, 2, 1, 4)
    meta = q.to("meta")
    out, lse = attention(meta, meta, meta, return_lse=True)
    assert out.device.type == "meta" and out.shape == q.shape and lse.shape == (1, 1, 2)
    with pytest.raises((ArgumentError, NotImplementedError)) as raised:
        attention(q, meta, q)
    assert "meta" in str(raised.value) or "device" in str(raised.value)


def test_weights_check_their_arguments() -> None:
    with pytest.raises(ArgumentError, match="attention_weights: k has head_dim 8 but q has 9"):
        weights(R(2, 6, 4, 9), R(2, 6, 4, 8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("torch.__version__ = '2.9.1+cpu'", "needs torch >= 2.10 but torch is 2.9.1+cpu"),
        ("missing", "_C.so is missing; build it with `pip install .`"),
        ("broken", "does not load with torch"),
        ("stale", "was built from other sources than these Python files"),
    ],
)
def test_a_missing_or_mismatched_library_is_one_sentence(
    change: str, text: str, tmp_path: Path
) -> None:
    source = Path(flashattn_lite.__file__).parent
    package = tmp_path / "flashattn_lite"
    for path in source.rglob("*.py"):
        target = package / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    if change == "broken":
        (package / "_C.so").write_bytes(b"\x7fELF, but no library")
    elif change != "missing":
        (package / "_C.so").symlink_to(source / "_C.so")
    if change == "stale":
        ops = package / "_ops.py"
        ops.write_text(
            ops.read_text().replace('"softcap", "window_left"', '"window_left", "softcap"')
        )
    prelude = change if "torch" in change else ""
    result = subprocess.run(
        [sys.executable, "-c", f"import torch\n{prelude}\nimport flashattn_lite"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and last.startswith("ImportError: ") and text in last, (
        result.stderr
    )


def test_an_unknown_isa_in_the_environment_is_one_sentence() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import flashattn_lite"],
        cwd=Path(flashattn_lite.__file__).parents[1],
        env={**os.environ, "FAL_CPU_ISA": "avx1024"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert "ImportError: flashattn_lite: FAL_CPU_ISA is 'avx1024'; this build on this" in last
    assert last.endswith("baseline")


def test_a_bias_on_cuda_is_refused_where_a_gradient_is_wanted() -> None:
    """Before the forward pass, which CUDA has."""
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, 8, device="cuda", requires_grad=True)
        bias = torch.empty(1, 2, 3, 3, device="cuda")
    refuse = sys.modules["flashattn_lite.attention"]._refuse_gradients
    with pytest.raises(ArgumentError, match=r"^attention: bias is given and a gradient is wanted"):
        refuse("attention", q, q, bias)
    refuse("attention", q, q, None)
