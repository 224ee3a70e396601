"""transformers' mask functions in the kernels' terms.

transformers describes a mask as a function of (batch, head, query, key) and asks each attention
implementation to make of it what it needs. The usual ones (causal, windows, padding, packed
sequences) are recognised from the function itself, without evaluating it; the result is a tensor
that holds no elements unless somebody looks at them. All others are evaluated, and added to the
scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
import transformers.masking_utils as masking
from torch import Tensor
from transformers.utils.import_utils import is_tracing

from flashattn_lite._masks import Band, bias_of, kernel_window, padding_of

__all__ = ["CompactMask", "KernelOptions", "create_mask"]


class KernelOptions(TypedDict, total=False):
    """Those options of ``attention`` that a mask turns into."""

    window: tuple[int | None, int | None]
    seqused_q: Tensor | None
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int


class CompactMask(torch.Tensor):
    """A mask of 0 and -inf, (batch, 1, seqlen_q, seqlen_k), that is known by its rule. Any
    operation on it works on the dense mask, which is made then; attention uses ``keys`` and
    ``options`` instead. Not a bool one: models that know eager attention alone append scores."""

    keys: int
    """How many of the keys, from the first, are to be passed."""
    band: Band
    options: KernelOptions
    _make_dense: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        keys: int,
        band: Band,
        options: KernelOptions,
        make_dense: Callable[[], Tensor],
    ) -> CompactMask:
        mask: CompactMask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=bias_of(torch.empty(0, dtype=torch.bool), dtype).dtype, device=device
        )
        mask.keys, mask.band, mask.options, mask._make_dense = keys, band, options, make_dense
        return mask

    def dense(self) -> Tensor:
        """The mask as an ordinary tensor."""
        return bias_of(self._make_dense(), self.dtype).expand(self.shape)

    @property
    def hides_nothing(self) -> bool:
        """Whether every query sees every key."""
        return self.options == {"window": (None, None)}

    @property
    def moves_keys(self) -> bool:
        """Whether attention counts keys from elsewhere than the first one, in a bias too."""
        return "leftpad_k" in self.options or "cu_seqlens_k" in self.options

    def __repr__(self, **_options: Any) -> str:  # type: ignore[override]
        return f"CompactMask(shape={tuple(self.shape)}, keys={self.keys}, options={self.options})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def ordinary(x: Any) -> Any:
            return x.dense() if isinstance(x, CompactMask) else x

        args, kwargs = torch.utils._pytree.tree_map(ordinary, (args, kwargs or {}))
        return func(*args, **kwargs)


# ---- what a mask function says ------------------------------------------------------------------


class _Rule(NamedTuple):
    """Query i sees key j iff i - left <= j <= i + right, in positions, and, with ``segments``
    (batch, seqlen), both are of the same segment."""

    left: int | None = None
    right: int | None = None
    segments: Tensor | None = None
    remapped: bool = False  # positions count within segments, where they differ as indices do


def _code(factory: Callable[..., Any], *arguments: Any) -> Any:
    """What identifies the functions that a factory makes."""
    return factory(*arguments).__code__


_AND = _code(masking.and_masks)
_WINDOW = _code(masking.sliding_window_overlay, 1)
_WINDOW_BOTH_SIDES = _code(masking.sliding_window_bidirectional_overlay, 1)
_SEGMENTS = _code(masking.packed_sequence_mask_function, None)
_REMAPPED = _code(masking.remap_positions_for_packed_sequence, None, None)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


def _rule_of(function: Any) -> _Rule | None:
    """The rule that a mask function is, if it is a known one or an intersection of such."""
    if function is masking.causal_mask_function:
        return _Rule(right=0)
    if function is masking.bidirectional_mask_function:
        return _Rule()
    code = getattr(function, "__code__", None)
    if code is None or not getattr(function, "__closure__", None):
        return None
    captured = dict(
        zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True)
    )
    if code is _WINDOW:
        return _Rule(left=captured["sliding_window"] - 1)
    if code is _WINDOW_BOTH_SIDES:
        return _Rule(captured["sliding_window"], captured["sliding_window"])
    if code is _SEGMENTS:
        return _Rule(segments=captured["packed_sequence_mask"])
    if code is _REMAPPED:
        inner = _rule_of(captured["mask_function"])
        return None if inner is None else inner._replace(remapped=True)
    if code is _AND:
        rule = _Rule()
        for part in map(_rule_of, captured["mask_functions"]):
            if part is None or (part.segments is not None and rule.segments is not None):
                return None
            rule = _Rule(
                _least(rule.left, part.left),
                _least(rule.right, part.right),
                part.segments if rule.segments is None else rule.segments,
                rule.remapped or part.remapped,
            )
        return rule
    return None


def _segment_options(segments: Tensor, left: int | None, right: int | None) -> KernelOptions:
    """Packed sequences, all of the batch's one after the other: (batch * seqlen) tokens."""
    batch, seqlen = segments.shape
    new = torch.ones_like(segments, dtype=torch.bool)  # a batch entry begins a sequence
    new[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = new.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([starts, starts.new_tensor([batch * seqlen])]).to(torch.int32)
    longest = int(cu_seqlens.diff().max()) if len(starts) else 0
    return {
        "window": (left, right),
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


def _kernel_options(
    rule: _Rule, q_length: int, kv_length: int, shift: int, real: Tensor | None
) -> tuple[int, KernelOptions] | None:
    """How many of the keys to pass, and the options; None where no options say it.

    Args:
        shift: position of the first query minus that of the first key.
        real: bool (batch, kv_length): False is padding.
    """
    left, right, segments, remapped = rule
    if segments is not None:
        whole = q_length == kv_length == segments.shape[1] and shift == 0
        if not whole or real is not None:
            return None
        return kv_length, _segment_options(segments, left, right)
    if remapped or (left is not None and left < 0):
        return None
    # From the first row and key, the query at row i is on the diagonal j = i + shift.
    band = Band(None if left is None else left - shift, None if right is None else right + shift)
    aligned = kernel_window(band, q_length, kv_length)
    if aligned is None:
        return None
    keys, window = aligned
    options: KernelOptions = {"window": window}
    if real is None:
        return keys, options
    padding = padding_of(real[:, :keys])
    if padding is None:
        return None
    leftpad, used = padding
    if leftpad is not None:
        options["leftpad_k"] = leftpad
    if used is not None:
        options["seqused_k"] = used
        if window != (None, None):
            if keys > q_length + shift:
                return None  # there are keys after the last query: its own may not be padding
            # The kernels' diagonal ends in the last query and key in use: the queries whose own
            # keys are padding go (their rows are 0), and so the diagonal stays where it was.
            options["seqused_q"] = (used - keys + q_length).clamp_min(0)
    return keys, options


def create_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_options: Any,
) -> Tensor:
    """transformers' AttentionMaskInterface: called once per forward and kind of layer.

    Returns: a CompactMask, or a mask of 0 and -inf, (batch, 1, q_length, kv_length).
    """

    def make_dense() -> Tensor:
        mask = masking.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,  # type: ignore[arg-type]  # static caches give a tensor
            kv_offset,
            mask_function,
            attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask is not None  # it may only be skipped where that is allowed
        return mask

    probe = torch.empty(0) if attention_mask is None else attention_mask
    rule = None if is_tracing(probe) else _rule_of(mask_function)
    if rule is not None:
        real = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if real is not None:
            real = real[:, kv_offset : kv_offset + kv_length].to(torch.bool)
            real = None if bool(real.all()) else real.expand(batch_size, -1)
        found = _kernel_options(rule, q_length, kv_length, int(q_offset) - kv_offset, real)
        if found is not None:
            return CompactMask(
                (batch_size, 1, q_length, kv_length),
                torch.device(device),
                dtype,
                *found[:1],
                Band(rule.left, rule.right),
                found[1],
                make_dense,
            )
    return bias_of(make_dense(), dtype)
