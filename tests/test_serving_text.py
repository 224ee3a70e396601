"""From tokens to text: characters across tokens, stop strings, the end, the folder's tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from serving_workload import no_leak

from flashattn_lite.serving import (
    Completion,
    Engine,
    RequestError,
    SamplingParams,
    load_tokenizer,
)
from flashattn_lite.serving.detokenizer import Detokenizer, StopStrings
from tests.serving_models import ScriptedModel, byte_tokenizer

TEXT = "naïve 日本語 👩‍👩‍👧 \x00 ok 👍🏽!"


@pytest.mark.parametrize("cut", [0, 3, 20])
def test_characters_split_across_tokens_come_out_whole(cut: int) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    stream = Detokenizer(tokenizer, tokens[:cut])
    pieces = [stream.add(t) for t in tokens[cut:]]
    assert all("\ufffd" not in piece for piece in pieces)
    # A character that the prompt began belongs to what follows.
    whole = tokenizer.decode(tokens[:cut]).rstrip("\ufffd")
    assert "".join(pieces) == TEXT[len(whole) :]
    assert stream.finish() == ""


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_come_out_as_decoded(seed: int) -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(seed)
    text = "".join(rng.choice("aé日👍") for _ in range(60)).encode()
    noise = bytes(b if rng.random() < 0.9 else rng.randrange(256) for b in text)
    alphabet = {tokenizer.decode([i]): i for i in range(128)}
    assert len(alphabet) >= 95
    table = {b: i for i, b in enumerate(_bytes_of_tokens(tokenizer))}
    tokens = [table[b] for b in noise]
    stream = Detokenizer(tokenizer)
    text_out = "".join(stream.add(t) for t in tokens) + stream.finish()
    assert text_out == tokenizer.decode(tokens) == noise.decode("utf-8", "replace")


def _bytes_of_tokens(tokenizer: Any) -> list[int]:
    """The byte of each of the 256 tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    return [byte_of[tokenizer.backend.id_to_token(i)] for i in range(256)]


def test_stop_strings() -> None:
    stops = StopStrings(["</s>", "\n\n"])
    assert stops.add("abc<") == ("abc", None)
    assert stops.add("/b>") == ("</b>", None)
    assert stops.add("x\n") == ("x", None)
    assert stops.add("</") == ("\n", None)
    assert stops.add("s>tail") == ("", "</s>")
    earliest = StopStrings(["bcd", "c"])
    assert earliest.add("abcd") == ("ab", "c")
    longest = StopStrings(["c", "bc"])
    assert longest.add("abcd") == ("a", "bc")
    held = StopStrings(["xyz"])
    assert held.add("axy") == ("a", None) and held.finish() == "xy"


def scripted(text: str, prompt: int = 4, **params: Any) -> tuple[Completion, list[str]]:
    """What an engine makes of a model that says `text`, and the pieces that it came in."""
    tokenizer = byte_tokenizer()
    tokens = [*tokenizer.encode(text), 258]
    engine = Engine(
        ScriptedModel(lambda place: tokens[min(place - prompt, len(tokens) - 1)]), tokenizer
    )
    engine.submit("q" * prompt, SamplingParams(**{"max_tokens": 200, "temperature": 0} | params))
    result, pieces = Completion("", []), []
    while engine.has_work():
        for output in engine.step():
            result.add(output)
            pieces.append(output.text)
    no_leak(engine)
    return result, pieces


def test_the_end_token_ends_and_is_no_text() -> None:
    result, _ = scripted(TEXT)
    assert (result.text, result.finish_reason, result.stop_reason) == (TEXT, "stop", None)
    assert result.token_ids[-1] == 258
    result, _ = scripted("ab", ignore_eos=True, max_tokens=5)
    assert (result.text, result.finish_reason) == ("ab", "length")
    assert result.token_ids[2:] == [258] * 3


def test_a_stop_string_across_tokens_is_cut() -> None:
    result, pieces = scripted("The answer is 42. END of text", stop=["END"])
    assert (result.text, result.finish_reason) == ("The answer is 42. ", "stop")
    assert result.stop_reason == "END"
    assert "E" not in "".join(pieces)
    result, _ = scripted("no end, EN", stop=["END"])
    assert (result.text, result.stop_reason) == ("no end, EN", None)
    result, _ = scripted("日本語", stop="本")
    assert (result.text, result.stop_reason) == ("日", "本")


def test_a_stop_token_ends() -> None:
    token = byte_tokenizer().encode("!")[0]
    result, _ = scripted("stop! here", stop_token_ids=[token])
    assert (result.text, result.finish_reason, result.stop_reason) == ("stop", "stop", token)
    assert result.token_ids[-1] == token


def test_half_a_character_at_the_end_is_given_out() -> None:
    result, pieces = scripted("ab👍", max_tokens=4)
    assert result.text == "ab\ufffd" and result.finish_reason == "length"
    assert pieces == ["a", "b", "", "\ufffd"]


def test_the_tokenizer_is_the_folders(tmp_path: Path) -> None:
    folder = tmp_path
    byte_tokenizer(folder)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.special_id("eos_token") == 258
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages) == "<user>hi\n"
    tokenizer.chat_template, tokenizer._compiled = "{{ raise_exception('no roles') }}", None
    with pytest.raises(RequestError, match="do not fit the chat template: no roles"):
        tokenizer.apply_chat_template(messages)
    tokenizer.chat_template, tokenizer._compiled = "{% unknown %}", None
    with pytest.raises(RequestError, match="do not fit the chat template: Encountered unknown tag"):
        tokenizer.apply_chat_template(messages)
    with pytest.raises(FileNotFoundError, match=r"there is no .*tokenizer\.json"):
        load_tokenizer(folder / "none")
