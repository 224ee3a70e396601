"""`flashattn-lite generate` and `serve`: what they print and refuse, without and with packages."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashattn_lite
from flashattn_lite.cli import main
from flashattn_lite.serving import Engine, EngineConfig, SamplingParams, load_model, load_tokenizer
from flashattn_lite.serving.command import EMBEDDED, MODEL_PACKAGES, SERVER_PACKAGES

PROMPT = "def add(a, b):"
EXTRAS = (*MODEL_PACKAGES, *SERVER_PACKAGES, "jinja2", "pydantic", "starlette", "openai")


def test_generate_prints_the_prompt_and_what_follows(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", PROMPT, "--max-tokens", "20", "--temperature", "0"]
    words += ["--repetition-penalty", "1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    config = EngineConfig(max_running=1, prefix_cache=False)
    model = load_model(EMBEDDED, dtype=torch.float32)
    engine = Engine(model, load_tokenizer(EMBEDDED), config)
    text = engine.generate([PROMPT], SamplingParams(max_tokens=20, temperature=0))[0].text
    assert out == PROMPT + text + "\n"
    assert "tokens read, " in err and "tokens/s]" in err


def test_the_same_seed_gives_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", PROMPT, "--max-tokens", "24", "--seed", seed, "--quiet"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_and_a_text_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Adds numbers."))
    words = ["--max-tokens", "8", "--temperature", "0", "--quiet"]
    assert main(["generate", "-", "--chat", *words]) == 0
    answer = capsys.readouterr().out
    assert main(["generate", "# Adds numbers.\n", *words]) == 0
    assert capsys.readouterr().out == "# Adds numbers.\n" + answer


def test_the_models_own_defaults_are_taken_and_overruled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    (folder / "generation_config.json").write_text('{"temperature": 0, "top_k": null}')

    def text(*words: str) -> str:
        common = ["--model", str(folder), "--max-tokens", "16", "--quiet"]
        assert main(["generate", PROMPT, *common, *words]) == 0
        return capsys.readouterr().out

    assert text() == text() == text("--temperature", "0")  # greedy, by the folder
    assert text("--temperature", "1.5", "--seed", "1") != text(
        "--temperature", "1.5", "--seed", "2"
    )
    (folder / "generation_config.json").unlink()
    assert text("--seed", "1") == text("--seed", "1", "--temperature", "0.7", "--top-p", "0.95")


def test_stop_ends_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", PROMPT, "--temperature", "0", "--quiet", "--max-tokens", "30"]
    assert main(words) == 0
    text = capsys.readouterr().out[len(PROMPT) :]
    stop = text[8:10]
    assert main([*words, "--stop", stop]) == 0
    assert capsys.readouterr().out == PROMPT + text[: text.index(stop)] + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--temperature", "-1"], "generate: temperature is -1.0; it must be"),
        (["generate", "x", "--model", "none"], "generate: --model none: "),
        (["generate", "x", "--max-tokens", "2000"], "max_tokens is 2000, together 2001; at most"),
        (["generate", ""], "generate: prompt is empty"),
        (["generate", "x", "--device", "tpu"], "generate: --device tpu: it must be cpu, cuda"),
        (["serve", "--device", "cuda"], "serve: --device cuda: torch sees no CUDA device"),
        (["bench", "serving", "--json", "/dev/null/r"], "bench serving: --json /dev/null/r: "),
        (["bench", "serving", "--plot", "/dev/null/p"], "bench serving: --plot /dev/null/p: "),
        (["serve", "--model", "none"], "serve: --model none: "),
        (["serve", "--max-step-tokens", "3"], "serve: EngineConfig: max_step_tokens is 3"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--max-tokens", "0"], "'0' is not a whole number above 0"),
        (["generate"], "the following arguments are required: text"),
        (["serve", "--drain", "-1"], "'-1' is not a number of seconds"),
        (["serve", "--dtype", "int4"], "invalid choice: 'int4'"),
        (["serve", "--port", "65536"], "'65536' is not a port, 0 to 65535"),
    ],
)
def test_wrong_usage_exits_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def in_plain_installation(code: str) -> str:
    """What the code prints where nothing but torch is installed."""
    root = Path(flashattn_lite.__file__).parents[1]
    block = f"import sys\nsys.modules.update(dict.fromkeys({(*EXTRAS, 'xxhash')!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, check=True, cwd=root
    )
    return done.stdout


def test_importing_and_info_need_no_extra() -> None:
    code = "import flashattn_lite\nfrom flashattn_lite.cli import main\nprint(main(['info']))"
    assert in_plain_installation(code).endswith("\n0\n")


def test_importing_takes_in_no_extra() -> None:
    code = "import sys, json, flashattn_lite\n"
    code += f"print(json.dumps([m for m in {EXTRAS!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_missing_package_is_one_sentence_with_the_remedy() -> None:
    code = """
from contextlib import redirect_stderr
from flashattn_lite.cli import main
with redirect_stderr(sys.stdout):
    for words in (["generate", "x"], ["serve"], ["bench", "serving"]):
        assert main(words) == 2
    del sys.modules["tokenizers"], sys.modules["safetensors"]
    assert main(["serve"]) == 2
from flashattn_lite import demo
sys.modules["tokenizers"] = None
demo._show_text()
"""
    lines = in_plain_installation(code).splitlines()
    remedy = "pip install 'flashattn-lite[serve]'"
    assert lines[:4] == [
        f"flashattn-lite generate: serving needs tokenizers; {remedy}",
        f"flashattn-lite serve: serving needs tokenizers; {remedy}",
        f"flashattn-lite bench serving: serving needs tokenizers; {remedy}",
        f"flashattn-lite serve: serving needs fastapi; {remedy}",
    ]
    assert lines[-1] == f"  Left out: serving needs tokenizers; {remedy}"


def test_the_demo_ends_with_a_models_text(capsys: pytest.CaptureFixture[str]) -> None:
    from flashattn_lite import demo

    demo._show_text()
    out = capsys.readouterr().out
    before, _, text = out.partition(demo.PROMPT)
    assert "Text: a model of" in before and len(text) > 200
