"""The tokenizer of a GGUF file as `tokenizers` and transformers have it, from its metadata.

Byte-level BPE ("gpt2") is rebuilt with the pre-tokenizer that the file names, SentencePiece ("llama") as BPE with byte fallback, whose merges
follow from the scores. transformers' own converter is not used: its reader imports torch, it takes "smollm" and every pre-tokenizer that it does
not know for GPT-2's, and it leaves `add_space_prefix` aside. Where it knows the pre-tokenizer, composed text has the same tokens.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from seer_jax.gguf.header import DAMAGED, GGUFHeader, shown

if TYPE_CHECKING:
    import tokenizers

_KEY = "tokenizer.ggml"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
TEMPLATE = "tokenizer.chat_template"
_PADDING = re.compile(r"\[PAD\d+\]")  # what llama.cpp calls rows of the embedding that have no token
_SPACE = "\u2581"  # SentencePiece's

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_END}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_END}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Splits:
    """How text is cut before byte-level merges.

    Attributes:
      pattern: of the pieces; None: GPT-2's.
      digits: whether each digit is a piece of its own.
      whole: whether a piece that is a token stays one whatever its merges.
      compose: whether text is brought to Unicode's form NFC first.
      add_bos: whether texts start with BOS where the file does not say.
    """

    pattern: str | None = None
    digits: bool = False
    whole: bool = False
    compose: bool = False
    add_bos: bool = False


# By tokenizer.ggml.pre; other names are refused, as other pieces give other tokens.
PRE_TOKENIZERS: Mapping[str, _Splits] = {
    "gpt-2": _Splits(),
    "smollm": _Splits(digits=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _Splits(_LLAMA3, whole=True, add_bos=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _Splits(_QWEN2, compose=True)),
    "tekken": _Splits(_TEKKEN, whole=True, add_bos=True),
}


def tokenizer_config_of(header: GGUFHeader) -> dict[str, Any]:
    """The `tokenizer_config.json`: special tokens by name, those that are added to texts, and chat templates.

    Raises:
      ValueError: the file has no tokenizer, or an entry is of a wrong type.
    """
    tokens, kinds = _tokens(header)
    special = {name: tokens[index] for name, index in special_ids(header).items()}
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    values["added_tokens_decoder"] = {
        str(i): dict(content=tokens[i], special=marked, normalized=False, lstrip=False, rstrip=False, single_word=False)
        for i, marked in _added(header, kinds).items()
    }
    context = header.metadata.get(f"{header.metadata.get('general.architecture')}.context_length")
    if type(context) is int:
        values["model_max_length"] = context
    if templates := chat_templates_of(header):
        default = templates.get("default")
        named = [dict(name=name, template=source) for name, source in templates.items()]
        values["chat_template"] = default if len(templates) == 1 and default is not None else named
    return values


def chat_templates_of(header: GGUFHeader) -> dict[str, str]:
    """Chat templates by name, see `chat.load_templates`."""
    keys = [key for key in header.metadata if key == TEMPLATE or key.startswith(f"{TEMPLATE}.")]
    return {key.removeprefix(TEMPLATE).removeprefix(".") or "default": header.get(key, str) for key in keys}


def special_ids(header: GGUFHeader) -> dict[str, int]:
    """Ids of the special tokens by their names in `tokenizer_config.json`."""
    count = len(_tokens(header)[0])
    keys = {name: f"{_KEY}.{key}_token_id" for name, key in SPECIAL.items()}
    ids = {name: header.get(key, int) for name, key in keys.items() if key in header.metadata}
    for name, index in ids.items():
        if not 0 <= index < count:
            raise ValueError(f"{header.path}: {keys[name]} must be one of {count} tokens; got {index}. {DAMAGED}")
    return ids


def tokenizer_of(header: GGUFHeader) -> "tokenizers.Tokenizer":
    """The tokenizer.

    Raises:
      ValueError: the file has none, one of another kind or with an unknown pre-tokenizer, or a damaged one.
    """
    kind = header.metadata.get(f"{_KEY}.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        got = "no tokenizer" if kind is None else f"{_KEY}.model {shown(kind)}"
        raise ValueError(
            f"{header.path} must hold a tokenizer of kind {' or '.join(builders)}; it has {got}. Use a Hugging Face folder of the model."
        )
    tokens, kinds = _tokens(header)
    try:
        backend = builders[kind](header, tokens, kinds)
        _add_tokens(backend, tokens, _added(header, kinds))
        _add_ends(backend, header, tokens)
    except ValueError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{header.path} must hold a whole tokenizer; {error}. {DAMAGED}") from error
    wrong = [i for i in _added(header, kinds) if backend.token_to_id(tokens[i]) != i]
    if wrong:
        raise ValueError(
            f"{header.path}: each token must be there once; got {shown(tokens[wrong[0]])} again. {DAMAGED}"
        )
    return backend


def _tokens(header: GGUFHeader) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens."""
    tokens = _list(header, f"{_KEY}.tokens", str)
    kinds = _list(header, f"{_KEY}.token_type", int, default=[NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(
            f"{header.path}: {_KEY}.token_type must be as long as {_KEY}.tokens, {len(tokens)}; got {len(kinds)}. {DAMAGED}"
        )
    return tokens, kinds


def _list(header: GGUFHeader, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
    values = header.get(key, list, default)
    if values and any(type(v) is not kind for v in values):
        raise ValueError(f"{header.path}: {key} must be a list of type {kind.__name__}; got {shown(values)}. {DAMAGED}")
    return values


def _added(header: GGUFHeader, kinds: Sequence[int]) -> dict[int, bool]:
    """Ids of tokens that are found in texts as they are, and whether each is special."""
    special = set(special_ids(header).values())
    return {
        i: kind != USER_DEFINED or i in special
        for i, kind in enumerate(kinds)
        if kind in (CONTROL, USER_DEFINED) or i in special
    }


def _byte_level(header: GGUFHeader, tokens: list[str], kinds: list[int]) -> "tokenizers.Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    splits = _splits(header)
    kept = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if not _is_padding(token, kind)}
    merges = [_pair(merge) for merge in _list(header, f"{_KEY}.merges", str)]
    _check_merges(header, kept, merges)
    backend = Tokenizer(models.BPE(kept, merges, ignore_merges=splits.whole))
    if splits.compose:
        backend.normalizer = normalizers.NFC()
    first = [pre_tokenizers.Digits(individual_digits=True)] if splits.digits else []
    if splits.pattern is not None:
        first = [pre_tokenizers.Split(Regex(splits.pattern), behavior="isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits.pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last])
    backend.decoder = decoders.ByteLevel()
    return backend


def _splits(header: GGUFHeader) -> _Splits:
    name = header.metadata.get(f"{_KEY}.pre")
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        got = "none" if name is None else shown(name)
        raise ValueError(
            f"{header.path}: {_KEY}.pre must be one of {', '.join(PRE_TOKENIZERS)}; got {got}. Other pre-tokenizers would give other tokens: "
            "use a Hugging Face folder of the model."
        )
    return PRE_TOKENIZERS[name]


def _is_padding(token: str, kind: int) -> bool:
    return kind == UNUSED and _PADDING.fullmatch(token) is not None


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge[1:].partition(" ")  # a token may be a space
    return merge[:1] + left, right


def _check_merges(header: GGUFHeader, vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> None:
    """Raises ValueError for a merge of or to what is no token, at which `tokenizers` would panic."""
    for left, right in merges:
        if not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(
                f"{header.path}: {_KEY}.merges must be of two tokens to one; got {shown(f'{left} {right}')}. {DAMAGED}"
            )


def _sentencepiece(header: GGUFHeader, tokens: list[str], kinds: list[int]) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    if header.metadata.get(f"{_KEY}.precompiled_charsmap"):
        raise ValueError(
            f"{header.path}: {_KEY}.precompiled_charsmap must be absent; such a tokenizer can't be rebuilt. Use a Hugging Face folder of the model."
        )
    prefix = header.get(f"{_KEY}.add_space_prefix", bool, True)
    unknown = next((token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = _merges(header, tokens, kinds)
    _check_merges(header, vocab, merges)
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return backend


def _merges(header: GGUFHeader, tokens: list[str], kinds: list[int]) -> list[tuple[str, str]]:
    """The file's merges; without them, all ways to make a token of two, the best token first."""
    if f"{_KEY}.merges" in header.metadata:
        return [_pair(merge) for merge in _list(header, f"{_KEY}.merges", str)]
    scores = _list(header, f"{_KEY}.scores", float)
    if len(scores) != len(tokens):
        raise ValueError(
            f"{header.path}: {_KEY}.scores must be as long as {_KEY}.tokens, {len(tokens)}; got {len(scores)}. {DAMAGED}"
        )
    ids = {token: i for i, token in enumerate(tokens) if kinds[i] in (NORMAL, USER_DEFINED)}
    found = []
    for token, i in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def _add_tokens(backend: "tokenizers.Tokenizer", tokens: Sequence[str], added: Mapping[int, bool]) -> None:
    from tokenizers import AddedToken

    marked = {
        kind: [AddedToken(tokens[i], special=kind, normalized=False) for i, k in added.items() if k is kind]
        for kind in (True, False)
    }
    backend.add_special_tokens(marked[True])
    backend.add_tokens(marked[False])


def _add_ends(backend: "tokenizers.Tokenizer", header: GGUFHeader, tokens: Sequence[str]) -> None:
    """BOS and EOS around texts, where the file asks for them; without its word, as llama.cpp does for the kind of tokenizer."""
    from tokenizers import processors

    byte_level = header.metadata[f"{_KEY}.model"] == "gpt2"
    default = dict(bos=_splits(header).add_bos if byte_level else True, eos=False)
    ids = special_ids(header)
    ends: dict[str, int] = {}
    for end, otherwise in default.items():
        wanted = header.get(f"{_KEY}.add_{end}_token", bool, otherwise and f"{end}_token" in ids)
        if wanted and f"{end}_token" not in ids:
            raise ValueError(
                f"{header.path}: {_KEY}.add_{end}_token must come with {_KEY}.{end}_token_id; got none. {DAMAGED}"
            )
        if wanted:
            ends[end] = ids[f"{end}_token"]
    if ends:
        bos, eos = ([tokens[ends[end]]] if end in ends else [] for end in ("bos", "eos"))
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *(f"{t}:1" for t in bos), "$B:1", *(f"{t}:1" for t in eos)],
            special_tokens=[(tokens[i], i) for i in ends.values()],
        )
