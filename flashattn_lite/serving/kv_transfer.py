"""Keys and values of a prompt on their way from the engine that computed them to the one that
decodes.

The four hooks have the names of vLLM's connectors. A prefill engine saves each layer as soon as it
is written, so sending overlaps with computing the next (Patel et al., Splitwise, ISCA 2024); a
decode engine takes a request when it has pages for it, and so holds back who sends
(Zhong et al., DistServe, OSDI 2024).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashattn_lite.serving.pool import PagePool
from flashattn_lite.serving.request import SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from flashattn_lite.serving.scheduler import Chunk

__all__ = ["Handover", "InProcessTransfer", "KVTransfer"]


@dataclass
class Handover:
    """A request after its first token, as one engine gives it to another.

    Args:
        request_id: its name, on both sides.
        prompt: its tokens.
        token: the first that was generated.
        logprob: the token's, when asked for.
        params: how to sample.
        seed: of its draws.
        cached_tokens: prompt tokens that the sender found in its prefix cache.
        parcel: the transfer's own: where the keys and values are.
    """

    request_id: str
    prompt: list[int]
    token: int
    logprob: TokenLogprob | None
    params: SamplingParams
    seed: int
    cached_tokens: int
    parcel: Any = None


class KVTransfer(ABC):
    """Moves keys and values between engines; each engine calls it from its own thread."""

    @abstractmethod
    def save_kv_layer(self, layer: int, pool: PagePool, chunks: Sequence[Chunk]) -> None:
        """Sender, in the forward pass: the chunks' keys and values of this layer are written."""

    @abstractmethod
    def wait_for_save(self) -> None:
        """Sender: returns when everything saved so far has left its pages."""

    @abstractmethod
    def send(self, handover: Handover, loan: int) -> None:
        """Sender: the request is complete. `loan` is a sequence of the sender's pool that keeps the
        pages until ``returned`` gives it back."""

    @abstractmethod
    def returned(self) -> list[int]:
        """Sender: loans whose pages have been read."""

    @abstractmethod
    def discard(self, request_id: str) -> None:
        """Sender: what was saved of a request is void; it was preempted, or has ended."""

    @abstractmethod
    def arrived(self) -> bool:
        """Receiver: whether ``receive`` has something."""

    @abstractmethod
    def receive(self) -> list[Handover]:
        """Receiver: requests that have arrived since the last call."""

    @abstractmethod
    def start_load_kv(self, handover: Handover, pool: PagePool, sequence: int) -> None:
        """Receiver, before the forward pass: begins to fill the sequence's pages."""

    @abstractmethod
    def wait_for_layer_load(self, layer: int) -> None:
        """Receiver, in the forward pass: returns when this layer of all that was begun is there."""


class _Parcel:
    """The keys and values of a prompt outside any pool: what would cross a network."""

    def __init__(self, pool: PagePool, tokens: int) -> None:
        layers, _, _, heads = pool.k.shape[:4]
        self.k = torch.empty((layers, tokens, heads, pool.k.shape[-1]), dtype=pool.k.dtype)
        self.v = torch.empty((layers, tokens, heads, pool.v.shape[-1]), dtype=pool.v.dtype)
        self.saved = [0] * layers  # tokens of each layer, from the first


class InProcessTransfer(KVTransfer):
    """Between two engines of one process. One thread copies for the sender, one for the receiver,
    in order, while their engines compute."""

    def __init__(self) -> None:
        self._sender = ThreadPoolExecutor(1, "kv-send")
        self._receiver = ThreadPoolExecutor(1, "kv-load")
        self._parcels: dict[str, _Parcel] = {}
        self._saves: deque[Future[None]] = deque()
        self._loans: deque[tuple[Future[None], int]] = deque()
        self._arrivals: deque[Handover] = deque()
        self._loads: dict[int, list[Future[None]]] = {}

    def save_kv_layer(self, layer: int, pool: PagePool, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            request, end = (
                chunk.request,
                min(chunk.start + chunk.count, chunk.request.prompt_tokens),
            )
            if request.sequence is None or request.generated:
                continue
            parcel = self._parcels.get(request.request_id)
            if parcel is None:
                parcel = self._parcels[request.request_id] = _Parcel(pool, request.prompt_tokens)
            begin = parcel.saved[layer]  # 0 even if the first tokens were found, not computed
            parcel.saved[layer] = end
            slots = pool.slots(request.sequence, begin, end)
            self._save(self._sender.submit(_copy_out, pool, layer, slots, parcel, begin, end))

    def _save(self, save: Future[None]) -> None:
        self._saves.append(save)
        while self._saves and self._saves[0].done():
            self._saves.popleft().result()

    def wait_for_save(self) -> None:
        while self._saves:
            self._saves.popleft().result()

    def send(self, handover: Handover, loan: int) -> None:
        handover.parcel = self._parcels.pop(handover.request_id)
        # Behind this request's copies in the sender's queue, so done when they are.
        self._loans.append((self._sender.submit(self._arrivals.append, handover), loan))

    def returned(self) -> list[int]:
        loans = []
        while self._loans and self._loans[0][0].done():
            future, loan = self._loans.popleft()
            future.result()
            loans.append(loan)
        return loans

    def discard(self, request_id: str) -> None:
        self._parcels.pop(request_id, None)

    def arrived(self) -> bool:
        return bool(self._arrivals)

    def receive(self) -> list[Handover]:
        arrived = []
        while self._arrivals:
            arrived.append(self._arrivals.popleft())
        return arrived

    def start_load_kv(self, handover: Handover, pool: PagePool, sequence: int) -> None:
        slots = pool.slots(sequence, 0, len(handover.prompt))
        for layer in range(pool.k.shape[0]):
            load = self._receiver.submit(_copy_in, pool, layer, slots, handover.parcel)
            self._loads.setdefault(layer, []).append(load)

    def wait_for_layer_load(self, layer: int) -> None:
        for load in self._loads.pop(layer, ()):
            load.result()

    def close(self) -> None:
        """Ends the threads; what is on the way arrives first."""
        self._sender.shutdown()
        self._receiver.shutdown()


@torch.inference_mode()
def _copy_out(
    pool: PagePool, layer: int, slots: Tensor, parcel: _Parcel, begin: int, end: int
) -> None:
    parcel.k[layer, begin:end] = pool.k[layer].flatten(0, 1)[slots]
    parcel.v[layer, begin:end] = pool.v[layer].flatten(0, 1)[slots]


@torch.inference_mode()
def _copy_in(pool: PagePool, layer: int, slots: Tensor, parcel: _Parcel) -> None:
    pool.k[layer].flatten(0, 1)[slots] = parcel.k[layer].to(pool.k.device)
    pool.v[layer].flatten(0, 1)[slots] = parcel.v[layer].to(pool.v.device)
