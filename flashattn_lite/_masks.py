"""What a dense mask says, in the kernels' own terms: a band along the diagonal, or padding.

A band or a pair of lengths lets a kernel skip the tiles that nobody sees; a dense mask makes it
read every score. Everything here is exact: what is not recognised stays dense.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from flashattn_lite import _ops

__all__ = [
    "TOP_LEFT_CAUSAL",
    "Band",
    "MaskOptions",
    "Padding",
    "band_of",
    "band_options",
    "bias_of",
    "contents_may_be_read",
    "is_causal_bias",
    "kernel_window",
    "mask_options",
    "padding_of",
]


class Band(NamedTuple):
    """Row i sees key j iff i - left <= j <= i + right: counted from the first row and key, as torch
    does, whereas the kernels count from the last ones. None is unbounded; sides may be negative."""

    left: int | None
    right: int | None


class Padding(NamedTuple):
    """The keys of one batch entry that are real: leftpad <= j < used, int32 (batch); None: all."""

    leftpad: Tensor | None
    used: Tensor | None


TOP_LEFT_CAUSAL = Band(None, 0)
_UNBOUNDED = 2**31  # a side, as csrc/torch/masks.cpp says it


class MaskOptions(TypedDict, total=False):
    """Those options of ``attention`` that masks turn into."""

    window: tuple[int | None, int | None]
    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    bias: Tensor | None


def kernel_window(
    band: Band, seqlen_q: int, seqlen_k: int
) -> tuple[int, tuple[int | None, int | None]] | None:
    """The same band for the kernels: how many of the keys to pass, and the window among those.

    Returns: (keys, (left, right)), or None where no window says it (a left side that is so negative
        that it hides a row's own diagonal).

    >>> kernel_window(Band(None, 0), 2, 5)  # torch's causal: keys 2, 3 and 4 are never seen
    (2, (None, 0))
    >>> kernel_window(Band(None, 0), 5, 2)  # rows 2, 3 and 4 see everything
    (2, (None, 3))
    >>> kernel_window(Band(-1, None), 3, 3) is None  # row 2 sees nothing
    True
    """
    keys = seqlen_k if band.right is None else max(0, min(seqlen_k, seqlen_q + band.right))
    shift = keys - seqlen_q  # the kernels' diagonal, seen from the first row and key
    left = None if band.left is None else band.left + shift
    if left is not None and left < 0:
        return None
    return keys, (left, None if band.right is None else max(0, band.right - shift))


def padding_of(mask: Tensor) -> Padding | None:
    """Which keys are real, when in every batch entry they are one run.

    Args:
        mask: (batch, seqlen_k), bool (True real), or float (0 real, -inf not). Elsewhere than on
            the CPU it waits for the device.

    >>> padding_of(torch.tensor([[False, True, True], [False, True, False]]))
    Padding(leftpad=tensor([1, 1], dtype=torch.int32), used=tensor([3, 2], dtype=torch.int32))
    """
    known, skips, ends_early, leftpad, used = _ops.mask_padding(mask.cpu())
    if not known:
        return None
    return Padding(
        leftpad.to(mask.device) if skips else None, used.to(mask.device) if ends_early else None
    )


def band_of(mask: Tensor) -> Band | None:
    """The band that a mask is, if it is one, and every row sees a key.

    Args:
        mask: (seqlen_q, seqlen_k), on the CPU, bool (True visible) or float (0 visible, -inf not).

    >>> band_of(torch.ones(3, 3, dtype=torch.bool).tril())
    Band(left=None, right=0)
    """
    known, left, right = _ops.mask_band(mask)
    if not known:
        return None
    return Band(None if left == _UNBOUNDED else left, None if right == _UNBOUNDED else right)


def band_options(band: Band, seqlen_q: int, seqlen_k: int) -> tuple[int, MaskOptions]:
    """How many of the keys to pass, and the options, for a band that ``kernel_window`` can say."""
    aligned = kernel_window(band, seqlen_q, seqlen_k)
    assert aligned is not None
    keys, window = aligned
    return keys, {"window": window}


def bias_of(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What to add to the scores. bool: True is visible."""
    if mask.dtype != torch.bool:
        return mask
    dtype = torch.float32 if dtype == torch.float64 else dtype  # 0 and -inf need no precision
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def is_causal_bias(mask: Tensor) -> bool:
    """Whether it is torch's CausalBias, whose elements are memory that nobody wrote: what it hides
    is in its attributes."""
    if type(mask) in (Tensor, torch.nn.Parameter):
        return False
    from torch.nn.attention.bias import CausalBias  # imports torch._dynamo: not before it is there

    return isinstance(mask, CausalBias)


def contents_may_be_read(mask: Tensor) -> bool:
    """Looking is cheap on the CPU; elsewhere it would wait for the device, and in a trace it would
    freeze what was seen. A mask that needs a gradient stays a bias."""
    return (
        mask.device.type == "cpu"
        and type(mask) in (Tensor, torch.nn.Parameter)
        and not mask.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.maybe_current_level()
    )


def mask_options(
    mask: Tensor, batch: int, seqlen_q: int, seqlen_k: int, dtype: torch.dtype
) -> tuple[int, MaskOptions]:
    """How many of the keys to pass, and the options, that apply a mask at the least cost.

    Args:
        mask: bool (True visible) or float (added), each dimension of (batch, heads_q, seqlen_q,
            seqlen_k) or 1.
        dtype: of q.
    """
    padding_shaped = mask.shape[1] == 1 and mask.shape[2] == 1
    band_shaped = mask.shape[:2] == (1, 1)
    worth_looking = (padding_shaped or band_shaped) and mask.shape[3] == seqlen_k and mask.numel()
    if worth_looking and contents_may_be_read(mask):
        if padding_shaped:
            padding = padding_of(mask[:, 0, 0])
            if padding is not None:
                leftpad, used = padding
                return seqlen_k, {
                    "leftpad_k": None if leftpad is None else leftpad.expand(batch).contiguous(),
                    "seqused_k": None if used is None else used.expand(batch).contiguous(),
                }
        else:
            band = band_of(mask[0, 0])
            if band is not None and kernel_window(band, seqlen_q, seqlen_k) is not None:
                return band_options(band, seqlen_q, seqlen_k)
    return seqlen_k, {"bias": bias_of(mask, dtype)}
