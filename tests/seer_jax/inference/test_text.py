"""Tokenizers, streamed text and chat templates; transformers is the judge of templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

import seer_jax
from seer_jax.inference.text import REPLACEMENT, Tokenizer

TINY_LM = Path(seer_jax.__file__).parent / "tiny_lm"
BYTE_LEVEL = Tokenizer.load(TINY_LM)


def byte_fallback() -> Tokenizer:
    """A tokenizer as Llama 2 had: words begin with U+2581, whatever is unknown is bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [*"▁abcdé", "▁a", "ab"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "a"), ("a", "b")],
            byte_fallback=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


BYTE_FALLBACK = byte_fallback()


def streamed(tokenizer: Tokenizer, tokens: list[int], sizes: int) -> list[str]:
    text = tokenizer.stream()
    pieces = [text.push(tokens[start : start + sizes]) for start in range(0, len(tokens), sizes)]
    return [*pieces, text.finish()]


@given(st.lists(st.integers(0, 4095), max_size=40), st.integers(1, 5))
def test_a_stream_of_any_tokens_gives_their_text(tokens: list[int], sizes: int):
    """Random tokens: special ones, and bytes that are no UTF-8, among them."""
    assert "".join(streamed(BYTE_LEVEL, tokens, sizes)) == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=30))
def test_a_stream_never_shows_parts_of_characters(tokenizer: Tokenizer, text: str):
    tokens = tokenizer.encode(text)
    pieces = streamed(tokenizer, tokens, 1)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte level", "byte fallback"])
def test_characters_come_when_they_are_complete(tokenizer: Tokenizer):
    tokens = tokenizer.encode("a🦜b")
    assert len(tokens) >= 5
    pieces = streamed(tokenizer, tokens, 1)
    assert [piece for piece in pieces if piece] == ["a", "🦜", "b"]
    cut = tokenizer.stream()
    assert cut.push(tokens[: len(tokens) - 2]) == "a"
    assert REPLACEMENT in cut.finish()


def test_encoding_is_the_tokenizers_own():
    text = "def f(x):\n    return x  # ünï 🦜\n"
    tokens = BYTE_LEVEL.encode(text)
    assert tokens == tokenizers.Tokenizer.from_file(str(TINY_LM / "tokenizer.json")).encode(text).ids
    assert BYTE_LEVEL.decode(tokens) == text
    end = BYTE_LEVEL.encode("<|endoftext|>")
    assert len(end) == 1
    assert BYTE_LEVEL.decode([*tokens, *end]) == text
    assert BYTE_LEVEL.decode([*tokens, *end], skip_special_tokens=False) == text + "<|endoftext|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled tokenizer, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_LM / name, tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_limits_left_in_the_file_do_not_cut_prompts(folder: Path):
    limit = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)
    change(folder / "tokenizer.json", truncation=limit)
    assert Tokenizer.load(folder).encode("one two three four five six") == BYTE_LEVEL.encode(
        "one two three four five six"
    )


def test_special_tokens_of_the_post_processor_are_added_unless_refused(folder: Path):
    bos = dict(SpecialToken=dict(id="<|endoftext|>", type_id=0))
    template = dict(
        type="TemplateProcessing",
        single=[bos, dict(Sequence=dict(id="A", type_id=0))],
        pair=[bos, dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
        special_tokens={"<|endoftext|>": dict(id="<|endoftext|>", ids=[0], tokens=["<|endoftext|>"])},
    )
    change(folder / "tokenizer.json", post_processor=template)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("x") == [0, *BYTE_LEVEL.encode("x")]
    assert tokenizer.encode("x", special_tokens=False) == BYTE_LEVEL.encode("x")


QWEN = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set content = message.content if message.content is string else '' %}
    {{- '<|im_start|>' + message.role + '\\n' + content.lstrip('\\n') + '<|im_end|>' + '\\n' }}
    {%- if loop.index0 == ns.last and enable_thinking is defined and not enable_thinking %}
        {{- '<think></think>' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{ bos_token }}
{% for message in messages %}
    {% if message['role'] not in ['user', 'assistant', 'system'] %}
        {{ raise_exception('Unknown role ' + message['role']) }}
    {% endif %}
    {{ {'role': message['role'], 'date': strftime_now('%Y')} | tojson }}
<|start|>{{ message['content'] | trim }}<|eot|>
{% endfor %}
"""
CHAT = [
    dict(role="system", content="Be brief. ünï <b>"),
    dict(role="user", content="\nHi 'there'  "),
    dict(role="assistant", content="Hello."),
    dict(role="user", content="Bye"),
]


@pytest.mark.parametrize("template", [QWEN, LLAMA], ids=["qwen", "llama"])
@pytest.mark.parametrize("variables", [{}, dict(enable_thinking=False), dict(tools=[dict(name="é")])], ids=str)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_templates_render_as_in_transformers(folder: Path, template: str, variables: dict, add_generation_prompt: bool):
    from transformers import AutoTokenizer

    change(folder / "tokenizer_config.json", chat_template=template)
    variables = dict(variables, add_generation_prompt=add_generation_prompt)
    expected = AutoTokenizer.from_pretrained(folder).apply_chat_template(CHAT, tokenize=False, **variables)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.render_chat(CHAT, **variables) == expected
    assert tokenizer.encode_chat(CHAT, **variables) == BYTE_LEVEL.encode(expected)


def test_a_template_file_comes_first_and_default_is_the_name_of_the_usual_one(folder: Path):
    named = [dict(name="tool_use", template="tools"), dict(name="default", template="usual {{ eos_token }}")]
    change(folder / "tokenizer_config.json", chat_template=named, eos_token=dict(content="<end>"))
    assert Tokenizer.load(folder).render_chat(CHAT) == "usual <end>"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).render_chat(CHAT) == "file"


def test_older_tokenizer_files_are_converted(tmp_path: Path):
    vocabulary = {piece: number for number, piece in enumerate([*"abĠ", "ab", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="Qwen2Tokenizer")))
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="qwen2")))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("ab a") == [3, 2, 0]
    assert tokenizer.decode([3, 2, 0]) == "ab a"


BAD_FOLDERS = [
    ({}, FileNotFoundError, "expected tokenizer.json in"),
    ({"tokenizer.json": "{}"}, ValueError, "must be a file of the tokenizers package"),
    ({"tokenizer_config.json": "{"}, ValueError, "tokenizer_config.json must hold JSON"),
    ({"tokenizer_config.json": "[]"}, ValueError, "must hold a JSON object; got a list"),
    ({"tokenizer.model": "x"}, ValueError, "has no tokenizer.json, and its other tokenizer files can't be converted"),
]


@pytest.mark.parametrize(("files", "error", "message"), BAD_FOLDERS, ids=[message for *_, message in BAD_FOLDERS])
def test_damaged_folders_are_refused(tmp_path: Path, files: dict[str, str], error: type[Exception], message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        Tokenizer.load(tmp_path)


BAD_CHATS = [
    (None, CHAT, "needs a chat template.*base model: give plain text instead"),
    ("{{ messages[0] }", CHAT, "does not accept this conversation"),
    (LLAMA, [dict(role="tool", content="")], "Unknown role tool"),
    (QWEN, [dict(role="user")], r"role and content; got \{'role': 'user'\}"),
    # Templates come with the model, from anywhere: they must reach nothing of this process.
    ("{{ messages.__class__.__base__.__subclasses__() }}", CHAT, "unsafe"),
    ("{{ messages.clear() }}", CHAT, "unsafe"),
]


@pytest.mark.parametrize(("template", "messages", "message"), BAD_CHATS, ids=[message for *_, message in BAD_CHATS])
def test_bad_conversations_are_refused(folder: Path, template: str | None, messages: list, message: str):
    change(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(folder).render_chat(messages)
