"""replace_attention: what it swaps, what it leaves and what it says about both."""

from __future__ import annotations

import torch

from flashattn_lite import nn as fal_nn

E, H = 32, 4


class HomemadeAttention(torch.nn.Module):
    pass


class DerivedAttention(torch.nn.MultiheadAttention):
    pass


def test_replace_reports_what_it_did_and_why_not() -> None:
    model = torch.nn.ModuleDict(
        {
            "plain": torch.nn.MultiheadAttention(E, H),
            "derived": DerivedAttention(E, H),
            "wide": torch.nn.MultiheadAttention(300, 1),
            "homemade": HomemadeAttention(),
            "ours": fal_nn.MultiheadAttention(E, H),
            "linear": torch.nn.Linear(3, 3),
        }
    )
    parameters = [id(p) for p in model.parameters()]
    seen: list[str] = []
    model["plain"].register_forward_hook(lambda *_: seen.append("hook"))
    report = fal_nn.replace_attention(model)
    assert report.swapped == {"plain": "flashattn_lite.nn.MultiheadAttention"}
    assert sorted(report.left) == ["derived", "homemade", "ours", "wide"]
    assert "derives from torch.nn.MultiheadAttention" in report.left["derived"]
    assert "use_as_sdpa" in report.left["homemade"]
    assert "head_dim is 300" in report.left["wide"]
    assert "already" in report.left["ours"]
    assert str(report).startswith("swapped 1, left 4\n  plain: flashattn_lite.nn")
    assert [id(p) for p in model.parameters()] == parameters
    assert isinstance(model["plain"], fal_nn.MultiheadAttention)
    x = torch.zeros(3, 9, E)
    model["plain"](x, x, x, need_weights=False)
    assert seen == ["hook"]


def test_replace_takes_the_model_itself() -> None:
    model = torch.nn.MultiheadAttention(E, H)
    assert fal_nn.replace_attention(model).swapped == {"": "flashattn_lite.nn.MultiheadAttention"}
    assert type(model) is fal_nn.MultiheadAttention
