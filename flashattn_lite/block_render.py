"""The blocks of a mask as text and as a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHARACTERS = "·▒█"  # not listed, partial, full


def text(kinds: Tensor, width: int) -> str:
    """One character a block, or for several of them where the mask is wider than ``width``.

    Args:
        kinds: int8 (blocks_q, blocks_k): 0 not listed, 1 partial, 2 full.
        width: characters of a line, at most.
    """
    step = max(1, -(-max(kinds.shape) // width))
    lines = []
    for r in range(0, kinds.shape[0], step):
        line = []
        for c in range(0, kinds.shape[1], step):
            part = kinds[r : r + step, c : c + step]
            lowest, highest = int(part.min()), int(part.max())
            line.append(_CHARACTERS[lowest if lowest == highest else 1])
        lines.append("".join(line))
    return "\n".join(lines)


def picture(kinds: Tensor, path: Any, title: str | None) -> Any:
    """An image of the blocks; to a file, or as matplotlib's figure when ``path`` is None."""
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "BlockMask.picture needs matplotlib, an optional dependency: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(2.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    colours = ListedColormap(["#f2f2f2", "#9ec5e8", "#1f5f99"])
    axes.imshow(kinds.to(torch.uint8).tolist(), cmap=colours, vmin=0, vmax=2, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    if title is not None:
        axes.set_title(title, fontsize=9)
    if path is None:
        return figure
    figure.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return None
