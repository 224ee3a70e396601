"""Draws the patterns of ``flashattn_lite.block_patterns`` into one picture.

python docs/draw_block_patterns.py docs/images/block_patterns.svg
"""

from __future__ import annotations

import sys

import matplotlib
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from flashattn_lite import BlockMask
from flashattn_lite import block_patterns as patterns

S, BLOCK = 2048, 64


def gallery() -> dict[str, BlockMask]:
    """Each pattern at a size at which its blocks can be told apart."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([500, 700, 300, 548]))
    verticals, slashes = torch.tensor([10, 700, 1300]), torch.tensor([0, 1, 500, 900])
    n = {"block_size": BLOCK}
    parents = [-1, *(node // 2 for node in range(63))]
    return {
        "causal": patterns.causal(S, **n),
        "sliding_window": patterns.sliding_window(S, 400, **n),
        "dilated_window": patterns.dilated_window(S, 4, 200, **n),
        "strided (by block)": patterns.strided(S, 384, by_block=True, **n),
        "fixed": patterns.fixed(S, 512, 64, **n),
        "longformer": patterns.longformer(S, 150, 64, **n),
        "bigbird": patterns.bigbird(S, **n),
        "butterfly": patterns.butterfly(S, **n),
        "pixelfly": patterns.butterfly(S, global_blocks=2, **n),
        "streaming": patterns.streaming(S, 4, 300, **n),
        "a_shape": patterns.a_shape(S, 256, 512, **n),
        "vertical_slash": patterns.vertical_slash(S, verticals, slashes, **n),
        "documents": patterns.documents(ids, **n),
        "prefix_lm": patterns.prefix_lm(S, 700, **n),
        "tree": patterns.tree(parents, 64, block_size=16),
    }


def main(path: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "block_patterns"  # the same file every time
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    colours = ListedColormap(["#f2f2f2", "#9ec5e8", "#1f5f99"])
    for axes, (name, mask) in zip(figure.subplots(3, 5).flat, gallery().items(), strict=True):
        kinds = mask.kinds()[0, 0].tolist()
        axes.imshow(kinds, cmap=colours, vmin=0, vmax=2, interpolation="none")
        axes.set_title(f"{name}, {100 * mask.block_density():.0f} %", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1])
