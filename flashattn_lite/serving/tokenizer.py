"""Text to tokens and back: a Hugging Face ``tokenizer.json`` and its chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flashattn_lite.serving._extras import require
from flashattn_lite.serving.request import RequestError

__all__ = ["Tokenizer", "load_tokenizer"]


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with its folder's special tokens and chat template.

    Args:
        backend: the ``tokenizers.Tokenizer``.
        config: the folder's tokenizer_config.json.
        chat_template: jinja2 source, or None.
    """

    def __init__(
        self, backend: Any, config: dict[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        self.backend = backend
        self.config = config or {}
        self.chat_template = chat_template
        self._compiled: Any = None

    @property
    def vocab_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the tokens that the model wants around a text, by default."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; U+FFFD where they end inside a character."""
        text = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return str(text)

    def token_text(self, token_id: int) -> str:
        """One token's text, special tokens by name: for lists of log-probabilities."""
        return self.decode([token_id], skip_special_tokens=False)

    def special_id(self, name: str) -> int | None:
        """The id of ``bos_token``, ``eos_token``, ... as tokenizer_config.json names it."""
        token = self._special(name)
        return None if token is None else self.backend.token_to_id(token)

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: {"role": ..., "content": ...} each, oldest first.
            add_generation_prompt: end with what makes the model answer.
            variables: more of the template's own, e.g. ``tools``.

        Raises:
            RequestError: when the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise RequestError("this model has no chat template; use a completion", "messages")
        jinja2 = require("jinja2")
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: self._special(name) or "" for name in names}
        try:
            if self._compiled is None:
                self._compiled = _environment(jinja2).from_string(self.chat_template)
            return str(
                self._compiled.render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    **special | variables,
                )
            )
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise RequestError(f"messages do not fit the chat template: {error}", "messages") from (
                error
            )

    def _special(self, name: str) -> str | None:
        token = self.config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        return token


def _environment(jinja2: Any) -> Any:
    """Sandboxed as transformers has it: a template comes with a model from anywhere."""
    sandbox = require("jinja2.sandbox")

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _strftime_now(pattern: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(pattern)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder: tokenizer.json, and beside it, if there,
    tokenizer_config.json and chat_template.jinja.

    Raises:
        FileNotFoundError: when there is no tokenizer.json.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"load_tokenizer: there is no {path}; save the tokenizer as a fast one "
            "(transformers: tokenizer.save_pretrained) to get it"
        )
    backend = require("tokenizers").Tokenizer.from_file(str(path))
    backend.no_truncation()  # settings that the tokenizer's training left behind
    backend.no_padding()
    config_path, template_path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template_path.is_file():
        template = template_path.read_text("utf-8")
    return Tokenizer(backend, config, template)
