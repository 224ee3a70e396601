"""From logits to tokens. Every draw is a function of (seed, place in the output) alone.

A request's tokens therefore do not depend on what else is in the batch, nor on whether it was
preempted. The random bits are Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
1, 2, 3", SC 2011), as in torch and JAX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from flashattn_lite.serving.request import Request, TokenLogprob

__all__ = ["Sampler", "philox", "uniform"]

_MASK = 0xFFFFFFFF
_CANDIDATES = 256  # sorted first for top_p and min_p; 16 times as many while these do not do


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random words of 32 bits.

    >>> [f"{word:08x}" for word in philox((0, 0, 0, 0), (0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), of 53 random bits, for a place in an output.

    >>> uniform(1, 0) == uniform(1, 0) != uniform(1, 1)
    True
    """
    words = philox((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


class Sampler:
    """Chooses the next token of each request."""

    def sample(
        self, logits: Tensor, requests: Sequence[Request]
    ) -> tuple[list[int | None], list[TokenLogprob | None]]:
        """One token for each request.

        Args:
            logits: float32 (requests, vocab_size); changed in place.
            requests: whose.

        Returns: the tokens, None where the logits are not numbers; log-probabilities, None where
            they were not asked for.
        """
        wanted = [i for i, r in enumerate(requests) if r.params.logprobs is not None]
        # Of the model's own distribution: before what follows changes the logits.
        raw = torch.log_softmax(logits[wanted], -1) if wanted else None
        self._penalise(logits, requests)
        peaks, best = logits.max(-1)
        numbers = torch.isfinite(peaks).tolist()
        tokens: list[int | None] = [
            token if number else None for token, number in zip(best.tolist(), numbers, strict=True)
        ]
        drawn = [i for i, r in enumerate(requests) if numbers[i] and not r.params.greedy]
        if drawn:
            rows = logits if len(drawn) == len(requests) else logits[drawn]
            for i, token in zip(drawn, self._draw(rows, [requests[i] for i in drawn]), strict=True):
                tokens[i] = token
        logprobs: list[TokenLogprob | None] = [None] * len(requests)
        if raw is not None:
            for row, i in enumerate(wanted):
                logprobs[i] = self._logprob(raw[row], tokens[i], requests[i].params.logprobs or 0)
        return tokens, logprobs

    def _penalise(self, logits: Tensor, requests: Sequence[Request]) -> None:
        for row, request in enumerate(requests):
            p = request.params
            if p.repetition_penalty != 1:
                seen = torch.tensor(list(set(request.tokens)), device=logits.device)
                values = logits[row, seen]
                scale = p.repetition_penalty
                logits[row, seen] = torch.where(values < 0, values * scale, values / scale)
            if p.presence_penalty != 0 or p.frequency_penalty != 0:
                counts = Counter(request.tokens[request.prompt_tokens :])
                if counts:
                    seen = torch.tensor(list(counts), device=logits.device)
                    times = torch.tensor([float(n) for n in counts.values()], device=logits.device)
                    logits[row, seen] -= p.presence_penalty + p.frequency_penalty * times

    def _draw(self, logits: Tensor, requests: Sequence[Request]) -> list[int]:
        """The inverse of the cumulative distribution at a uniform number: row by row where tokens
        are cut off, all other rows at once."""
        device = logits.device
        temperature = torch.tensor([[r.params.temperature] for r in requests], device=device)
        numbers = torch.tensor(
            [[uniform(r.seed, r.generated)] for r in requests], dtype=torch.float64, device=device
        )
        # The peak is subtracted first: a temperature near 0 must not overflow.
        scaled = (logits - logits.max(-1, keepdim=True).values) / temperature
        probs = torch.softmax(scaled, -1)
        tokens, whole = [0] * len(requests), []
        for row, request in enumerate(requests):
            p = request.params
            if p.top_k > 0 or p.top_p < 1 or p.min_p > 0:
                kept, ids = self._cut(scaled[row], probs[row], p.top_k, p.top_p, p.min_p)
                tokens[row] = int(ids[self._inverse(kept[None], numbers[row][None])])
            else:
                whole.append(row)
        if whole:
            found = self._inverse(probs[whole], numbers[whole]).tolist()
            for row, token in zip(whole, found, strict=True):
                tokens[row] = token
        return tokens

    @staticmethod
    def _inverse(probs: Tensor, numbers: Tensor) -> Tensor:
        """The first index whose cumulative sum exceeds number * total: (rows, n) -> (rows)."""
        total = probs.cumsum(-1, dtype=torch.float64)
        index = torch.searchsorted(total, numbers * total[:, -1:], right=True).squeeze(-1)
        return index.clamp_max(probs.shape[-1] - 1)

    @staticmethod
    def _cut(
        scaled: Tensor, probs: Tensor, top_k: int, top_p: float, min_p: float
    ) -> tuple[Tensor, Tensor]:
        """The kept tokens' probabilities, greatest first, and their ids: top_k, then top_p of what
        top_k left, then min_p, as transformers orders them."""
        count = min(top_k if top_k > 0 else _CANDIDATES, probs.shape[0])
        while True:
            ids = scaled.topk(count).indices
            values = probs[ids].double()
            if top_k > 0 or count == probs.shape[0]:
                break
            if values.sum() >= top_p if top_p < 1 else values[-1] < min_p * values[0]:
                break
            count = min(16 * count, probs.shape[0])
        if top_p < 1:
            before = values.cumsum(0) - values
            keep = before < top_p * (values.sum() if top_k > 0 else 1.0)
            values, ids = values[keep], ids[keep]
        if min_p > 0:
            keep = values >= min_p * values[0]
            values, ids = values[keep], ids[keep]
        return values, ids

    @staticmethod
    def _logprob(raw: Tensor, token: int | None, count: int) -> TokenLogprob | None:
        if token is None:
            return None
        values, ids = raw.topk(min(count, raw.shape[0]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return TokenLogprob(token, float(raw[token]), top)
