"""Chat templates of many shapes, tools, reasoning and special tokens: text and tokens are those of transformers."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import processors
from transformers import AutoTokenizer

import seer_jax
from seer_jax.inference.chat import content_of
from seer_jax.inference.text import Tokenizer, eos_token_of

TINY_LM = Path(seer_jax.__file__).parent / "tiny_lm"
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|header|>",
    "<|eot|>",
    "[INST]",
    "[/INST]",
    "<|Assistant|>",
    "<think>",
]

# ----------------------------------------------------------------------------------------------------- templates, by shape

LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|header|>system<|header|>\\n\\nToday: ' + strftime_now('%Y') + '\\n' }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
{%- endif %}
{{- system_message + '<|eot|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('One tool call at once!') }}{%- endif %}
        {{- '<|header|>assistant<|header|>\\n\\n{"name": "' + message.tool_calls[0].function.name + '"}<|eot|>' }}
    {%- else %}
        {{- '<|header|>' + message['role'] + '<|header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|header|>\\n\\n' }}{%- endif %}
"""
QWEN25 = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}{{- tool_call.arguments | tojson }}{{- '}' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n' + message.content }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
QWEN3 = """{%- set ns = namespace(last_query=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if not ns.found and message.role == 'user' %}
        {%- set ns.found = true %}{%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {%- if reasoning and loop.index0 > ns.last_query %}
        {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""
R1 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% set ns = namespace(system_prompt='') %}"
    "{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}"
    "{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}"
    "{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ message.role }}
{{ message['content'] }}<|im_end|>
{% endif %}
{% endfor %}
"""
GENERATION_TRIMMED = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\\n' }}
    {%- if m.role == 'assistant' %}{%- generation -%}  {{ m['content'] }} {{- '<|im_end|>' }} {%- endgeneration -%}
    {%- else %}{{- m['content'] + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}"""
LOOPS = """{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}
{{ {'role': message['role'], 'text': message['content'], 'é<&>': none} | tojson }}
{% endfor %}{{ dict(a=1) | tojson(sort_keys=true) }}"""
PARTS = """{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}"""
REASONING = "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content or '' }}|{{ m.thinking or '' }}|{{ m.content }}{{ eos_token }}{% endfor %}"

ZOO = {
    "Llama 3": (LLAMA3, "<|eot|>"),
    "Qwen2.5": (QWEN25, "<|im_end|>"),
    "Qwen3": (QWEN3, "<|im_end|>"),
    "R1 distill": (R1, "</s>"),
    "Mistral": (MISTRAL, "</s>"),
    "generation": (GENERATION, "<|im_end|>"),
    "generation, trimmed": (GENERATION_TRIMMED, "<|im_end|>"),
    "loop controls": (LOOPS, None),
    "parts": (PARTS, "<|im_end|>"),
    "reasoning": (REASONING, "</s>"),
}

# ---------------------------------------------------------------------------------------------------------- conversations

TOOLS = [
    dict(type="function", function=dict(name="add", description="é", parameters=dict(type="object", properties={})))
]
CALL = dict(type="function", function=dict(name="add", arguments=dict(a=1, b="ü")))
USER, SYSTEM = dict(role="user", content="\nHi 'there' <b>  "), dict(role="system", content=" Be brief. ünï ")
THOUGHT = dict(role="assistant", content="<think>\nLong thoughts.\n</think>\n\nHello.")
CHATS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one turn": ([USER], {}),
    "system": ([SYSTEM, USER, dict(role="assistant", content=" Hello. "), USER], {}),
    "without a prompt": ([SYSTEM, USER, dict(role="assistant", content="Hello.")], dict(add_generation_prompt=False)),
    "thoughts": ([USER, THOUGHT, USER, THOUGHT], dict(add_generation_prompt=False)),
    "thoughts apart": ([USER, dict(role="assistant", content="Hello.", reasoning_content="Hm.")], {}),
    "thoughts under an older name": ([USER, dict(role="assistant", content="Hello.", reasoning="Hm.")], {}),
    "no thinking": ([USER], dict(enable_thinking=False)),
    "tools": ([USER], dict(tools=TOOLS)),
    "a call": (
        [USER, dict(role="assistant", content=None, tool_calls=[CALL]), dict(role="tool", content="3")],
        dict(tools=TOOLS),
    ),
    "two calls": ([USER, dict(role="assistant", content="", tool_calls=[CALL, CALL])], dict(tools=TOOLS)),
    "keys that are null": (
        [dict(USER, tool_calls=None, name=None), dict(role="assistant", content="Hello.", tool_calls=None)],
        {},
    ),
    "two users": ([USER, USER], {}),
    "parts": (
        [dict(role="user", content=[dict(type="text", text="a"), dict(type="image"), dict(type="text", text="b")])],
        {},
    ),
    "special tokens in the text": ([dict(role="user", content="<s> </s><|im_end|>")], {}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled tokenizer with special tokens of chats, and BOS in front of texts."""
    root = tmp_path_factory.mktemp("chat")
    backend = tokenizers.Tokenizer.from_file(str(TINY_LM / "tokenizer.json"))
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    backend.save(str(root / "tokenizer.json"))
    write(root)
    return root


def write(folder: Path, **keys: Any) -> None:
    """tokenizer_config.json with these keys."""
    config = dict(tokenizer_class="TokenizersBackend", bos_token="<s>", eos_token="</s>", **keys)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def both(root: Path):
    """For a template: ours and transformers' tokenizer, made once."""

    @cache
    def make(name: str) -> tuple[Tokenizer, Any]:
        write(root, chat_template=ZOO[name][0])
        return Tokenizer.load(root), AutoTokenizer.from_pretrained(root)

    return make


@pytest.mark.parametrize("template", ZOO)
@pytest.mark.parametrize("chat", CHATS)
def test_conversations_are_those_of_transformers(both: Any, template: str, chat: str):
    messages, variables = CHATS[chat]
    ours, theirs = both(template)
    variables = dict(add_generation_prompt=True) | variables
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, **variables)
    except Exception as error:  # whatever the template raises
        with pytest.raises(ValueError, match=re.escape(str(error).rstrip("."))):
            ours.render_chat(messages, **variables)
        return
    assert ours.render_chat(messages, **variables) == text
    assert ours.encode_chat(messages, **variables) == theirs.apply_chat_template(messages, **variables)["input_ids"]


@pytest.mark.parametrize("template", ZOO)
def test_an_answer_ends_with_its_token(both: Any, template: str):
    tokenizer, end = both(template)[0], ZOO[template][1]
    assert tokenizer.end_of_turn() == (() if end is None else tuple(tokenizer.encode(end, special_tokens=False)))


@pytest.mark.parametrize(
    "keys", [{}, dict(add_bos_token=False), dict(add_eos_token=True), dict(padding_side="left")], ids=str
)
def test_texts_begin_and_end_as_in_transformers(root: Path, keys: dict[str, Any]):
    """tokenizer.json decides; BOS stands once in front of a text, and once in a chat whose template writes it."""
    write(root, chat_template=LLAMA3, **keys)
    ours, theirs = Tokenizer.load(root), AutoTokenizer.from_pretrained(root)
    (bos,) = ours.encode("<s>", special_tokens=False)
    for text in ("x", "", "<s>x"):
        assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.encode("x")[0] == bos
    assert ours.encode_chat([USER]).count(bos) == 1


LISTED = {"added_tokens_decoder": {"0": dict(content="<|endoftext|>", special=True)}}
SPECIAL_TOKENS: dict[
    str, tuple[dict[str, Any], dict[str, Any] | None]
] = {  # tokenizer_config.json, special_tokens_map.json
    "none": ({}, None),
    "texts": (dict(bos_token="<s>", eos_token="</s>"), None),
    "objects": (dict(eos_token=dict(content="</s>", __type="AddedToken", lstrip=False, rstrip=False)), None),
    "the older file alone": ({}, dict(eos_token=dict(content="</s>"))),
    "the older file first": (dict(eos_token="<s>"), dict(eos_token="</s>")),
    "the older file does not count": (LISTED | dict(eos_token="<s>"), dict(eos_token="</s>")),
    "null": (dict(eos_token=None), dict(eos_token="</s>")),
    "others": (dict(image_token="<|eot|>", extra_special_tokens=dict(image_token="<|eot|>")), None),
    "a list": (dict(additional_special_tokens=["<s>"]), None),
}


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_special_tokens_are_those_of_transformers(root: Path, tmp_path: Path, name: str):
    config, older = SPECIAL_TOKENS[name]
    (tmp_path / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | dict(tokenizer_class="TokenizersBackend")))
    if older is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).special == theirs.special_tokens_map
    assert eos_token_of(tmp_path) == theirs.eos_token_id


def test_templates_by_name_and_in_files_are_found_as_in_transformers(root: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
    named = [
        dict(name="tool_use", template="tools {{ tools | length }}"),
        dict(name="default", template="usual {{ eos_token }}"),
    ]

    def check(expected: str, expected_with_tools: str) -> None:
        ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for tools, text in ((None, expected), (TOOLS, expected_with_tools)):
            assert ours.render_chat([USER], tools=tools) == text
            assert theirs.apply_chat_template([USER], tools=tools, tokenize=False) == text

    write(tmp_path, chat_template=named)
    check("usual </s>", "tools 1")
    (tmp_path / "chat_template.jinja").write_text("file")
    check("file", "file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools in a file")
    check("file", "tools in a file")


def test_what_a_message_says():
    parts = [dict(type="text", text="a"), dict(type="image"), dict(type="text", text="b")]
    assert content_of(dict(role="user", content=parts)) == "ab"
    assert content_of(dict(role="assistant", content="c", reasoning="r")) == "rc"
    assert content_of(dict(role="assistant", tool_calls=[])) == ""


WRONG_FILES = {
    "number": (dict(chat_template=3), "tokenizer_config.json: chat_template must be a text, or a list .*; got '3'"),
    "list": (dict(chat_template=["x"]), "chat_template must be a text, or a list of objects with name and template"),
    "no template": (dict(chat_template=[dict(name="default")]), "must be a text, or a list"),
    "token": (
        dict(unk_token=dict(lstrip=True)),
        r"special token .* must be a text or have content; got {'lstrip': True}",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_settings_are_refused(root: Path, name: str):
    keys, message = WRONG_FILES[name]
    write(root, **keys)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(root)


def test_a_template_that_is_no_text_is_refused(root: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((root / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"chat_template.jinja must be UTF-8 text; it is UTF-16. Convert it: iconv"):
        Tokenizer.load(tmp_path)


# Templates come with the model, from anywhere: whatever their evaluation raises is one line.
BAD_CHATS: list[tuple[str | None, Any, str]] = [
    (None, [USER], "needs a chat template.*base model: give plain text instead"),
    ("{{ messages[0] }", [USER], "does not accept this conversation"),
    ("{{ messages[0].content + 1 }}", [USER], "does not accept this conversation: can only concatenate str"),
    ("{{ 1 // 0 }}", [USER], "does not accept this conversation: .*zero"),
    (
        "{{ messages[0].content.missing.more }}",
        [USER],
        "does not accept this conversation: .*has no attribute 'missing'",
    ),
    ("{{ messages.__class__.__base__.__subclasses__() }}", [USER], "unsafe"),
    ("{{ messages.clear() }}", [USER], "unsafe"),
    ("{{ cycler() }}", [USER], "does not accept this conversation: at least one item"),
    ("x", [dict(role="user")], r"role and content; got \{'role': 'user'\}"),
    ("x", [dict(role="user", content=None)], "role and content; got"),
    ("x", [], r"must be a list of at least one message; got \[\]"),
]


@pytest.mark.parametrize(("template", "messages", "message"), BAD_CHATS, ids=range(len(BAD_CHATS)))
def test_bad_conversations_are_refused(root: Path, template: str | None, messages: Any, message: str):
    write(root, chat_template=template)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(root).render_chat(messages)


def test_lone_surrogates_are_no_text(root: Path):
    with pytest.raises(ValueError, match=r"must be valid Unicode; got the lone surrogate '\\ud800' at character 1"):
        Tokenizer.load(TINY_LM).encode("a\ud800")
