"""Talk with a model: one conversation over many turns, each of which reads only what is new."""

import dataclasses
import shlex
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from seer_jax.checks import check_at_least
from seer_jax.commands import PROGRAM, ExitCode
from seer_jax.commands.arguments import model_of, parse, policy_help
from seer_jax.commands.chat.input import Stops, messages
from seer_jax.commands.errors.failures import failure, one_line
from seer_jax.commands.errors.signals import Terminated
from seer_jax.commands.text.generation import (
    Clock,
    TextOptions,
    chosen_policies,
    failure_of,
    has_failed,
    load_model,
    recommended_sampling,
    tell_policies,
)
from seer_jax.folder_lock import locked
from seer_jax.inference.conversation import Conversation
from seer_jax.inference.conversation.saved import FILE, SavedConversation
from seer_jax.inference.generate import Generated
from seer_jax.inference.request import Request
from seer_jax.inference.sampling import Greedy
from seer_jax.inference.text import Tokenizer
from seer_jax.models.decoder import Transformer
from seer_jax.models.pretrained import load_tokenizer
from seer_jax.outputs import check_output_folder
from seer_jax.selection.notation import write_policy
from seer_jax.text_files import read_text

DESCRIPTION = """Keeps one conversation with a model. Each line of standard input is a message; a line that ends in a backslash goes on in the next.
What was read is kept, so that a turn reads its own message and the answer before it alone.

{commands}

Ctrl-C stops an answer, Ctrl-D ends the chat.

{policies}"""

CHUNK = 256  # tokens that are read at a time: messages are short, and are filled up to whole chunks
CAPACITY = 32768  # at most, where none is named

# Options without which a saved conversation finds another model.
SAME_MODEL = ("model", "gates", "adapter", "revision", "cache_dir", "dtype", "mesh")

COMMANDS = {
    "/read FILE": "puts the text of a file before the next message",
    "/undo": "drops the text of files, or takes the last message and its answer back",
    "/save FOLDER": "writes the conversation; --load FOLDER goes on with it",
    "/help": "lists these commands",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig(TextOptions):
    """Keeps one conversation with a model.

    Attributes:
      capacity: tokens that the conversation has room for, answers included; None: the model's context, at most 32768, or as it was with
        load.
      prefill_chunk: tokens that are read at a time, a multiple of the block size; 0: all at once. None: 256.
      load: folder of a saved conversation to go on with, by its policies.
      save: folder for the conversation when the chat ends; it may be that of load. One chat at a time.
    """

    max_new_tokens: int = 1024
    capacity: int | None = None
    prefill_chunk: int | None = None
    load: Path | None = None
    save: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity is not None:
            check_at_least(1, self, "capacity")
        given = [
            f"`{name}`" for name in ("system", "prefill", "decode", "prefill_chunk") if getattr(self, name) is not None
        ]
        if self.load is not None and given:
            raise ValueError(
                f"{' and '.join(given)} must be left out with `load`, whose conversation has its own; got both. Start a new one without `load`."
            )

    @property
    def chunk(self) -> int:
        """Tokens that are read at a time, as in `Conversation`."""
        return CHUNK if self.prefill_chunk is None else self.prefill_chunk


def run(words: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {meaning}" for name, meaning in COMMANDS.items())
    description = DESCRIPTION.format(commands=listed, policies=policy_help())
    chat(parse(ChatConfig, "chat", words, description=description))
    return ExitCode.OK


def chat(config: ChatConfig) -> Conversation:
    """Answers the lines of standard input on standard output, until they end.

    Raises:
      ValueError, OSError, MemoryError: see `from_pretrained`, `load_tokenizer` and `Conversation`; on a pipe also for a message that can't be
        answered.
    """
    if config.save is not None:
        check_output_folder(config.save, setting="save")
        _check_own(config.save, [config.load], "save")
    if config.load is not None:
        SavedConversation.read_folder(config.load)  # refuses damaged ones before weights are loaded
    name = model_of(config.model, config.gates, config.hub, config.adapter)
    tokenizer = load_tokenizer(name, **config.hub)
    tokenizer.encode_turn("Hello", [], system=config.system)  # which refuses models without a template
    shapes = load_model(config, name, tokenizer, chat=True, abstract=True)
    request = Request.of(shapes, max_new_tokens=config.max_new_tokens, prefill=config.prefill, decode=config.decode)
    if config.load is None:
        Conversation.check(shapes, **_settings(config, shapes, request))
    if config.stats and config.load is None:
        tell_policies(chosen_policies(config, shapes, request), config)
        if recommendation := recommended_sampling(config, name):
            print(recommendation, file=sys.stderr)
    with locked(config.save, setting="save"):
        return _talk(config, name, tokenizer, request)


def _talk(config: ChatConfig, name: str, tokenizer: Tokenizer, request: Request) -> Conversation:
    """Loads the model, and talks until the lines end."""
    model = load_model(config, name, tokenizer, chat=True)
    talk = Chat(config, tokenizer, _conversation(config, model, request))
    if config.stats and config.load is not None:
        for phase, policy in talk.conversation.policies.items():
            print(f"{phase}: {write_policy(policy)} (saved with the conversation)", file=sys.stderr)
    if sys.stdin.isatty() and config.stats:
        print(
            f"Room for {talk.room} tokens. /help lists commands; Ctrl-C stops an answer, Ctrl-D ends the chat.",
            file=sys.stderr,
        )
    try:
        for line in messages():
            talk.take(line)
    finally:
        if config.save is not None:
            talk.save(config.save)
    return talk.conversation


def _check_own(folder: Path, own: Iterable[Path | None], subject: str) -> None:
    """Raises FileExistsError where a folder has a conversation, and is none of this chat's own."""
    if (folder / FILE).exists() and folder.resolve() not in [path.resolve() for path in own if path is not None]:
        raise FileExistsError(
            f"{subject} must name a new folder, or one of this chat; got {folder}, which has another conversation. Go on with that one "
            "(--load), or name another folder."
        )


def _conversation(config: ChatConfig, model: Transformer, request: Request) -> Conversation:
    if config.load is not None:
        return Conversation.load(config.load, model, capacity=config.capacity)
    return Conversation(model, **_settings(config, model, request))


def _settings(config: ChatConfig, model: Transformer, request: Request) -> dict[str, Any]:
    """Settings of a new `Conversation`."""
    capacity = min(model.config.context, CAPACITY) if config.capacity is None else config.capacity
    policies = dict(prefill=request.prefill, decode=request.decode)
    return dict(capacity=capacity, **policies, prefill_chunk=config.chunk)


class Chat:
    """A conversation in text.

    Attributes:
      conversation: of tokens.
    """

    def __init__(self, config: ChatConfig, tokenizer: Tokenizer, conversation: Conversation):
        self._config, self._tokenizer, self.conversation = config, tokenizer, conversation
        self._before = ""  # text of files, for the next message
        self._starts = list[int]()  # of the messages so far
        self._own = [config.load, config.save]  # folders that it may write over

    @property
    def room(self) -> int:
        """Tokens that messages and answers may have."""
        talk = self.conversation
        return talk.capacity if self._config.beyond_context else min(talk.capacity, talk.model.config.context)

    def take(self, line: str) -> None:
        """Answers a message, or does what a command says. On a terminal, what is wrong with it is told; on a pipe it ends the chat."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._answer(line)
        except (ValueError, OSError) as error:
            if not sys.stdin.isatty():
                raise
            print(one_line(failure(error, "--capacity") or str(error)), file=sys.stderr)

    def _command(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        known = {name.partition(" ")[0]: name for name in COMMANDS}
        if word not in known:
            raise ValueError(
                f"There is no command {word!r}; they are {', '.join(COMMANDS)}. Begin a message that starts with / with a space."
            )
        if bool(rest) != (" " in known[word]):
            raise ValueError(f"A command must be written {known[word]}; got {line.strip()!r}.")
        match word:
            case "/read":
                self._before += read_text(Path(rest).expanduser()).rstrip() + "\n\n"
            case "/save":
                _check_own(folder := Path(rest).expanduser(), self._own, "/save")
                self.save(folder)
                self._own.append(folder)
            case "/undo":
                self._undo()
            case _:
                print("\n".join(f"{name:<14}{meaning}" for name, meaning in COMMANDS.items()), file=sys.stderr)

    def _undo(self) -> None:
        if self._before:
            self._before = ""
            return
        if not self._starts:
            raise ValueError("There must be a message of this chat to take back; got none.")
        self.conversation.rewind(self._starts.pop())

    def save(self, folder: Path) -> None:
        """Writes the conversation."""
        self.conversation.save(folder)
        if self._config.stats:
            print(f"Saved; go on with {self._command_line(str(folder))}", file=sys.stderr)

    def _command_line(self, folder: str) -> str:
        """The command that goes on with a saved conversation, by the same model and gates."""
        words = [PROGRAM, "chat"]
        for name in SAME_MODEL:
            value = getattr(self._config, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if values:
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
        words += ["--beyond-context"] if self._config.beyond_context else []
        return shlex.join([*words, "--load", folder])

    def _answer(self, message: str) -> None:
        talk, config = self.conversation, self._config
        start = len(talk.tokens)
        tokens = self._tokenizer.encode_turn(self._before + message, talk.tokens, system=config.system)
        new = min(config.max_new_tokens, self._left(start + len(tokens)))
        if new < 1:
            raise ValueError(self._full(start, len(tokens)))
        key = None
        if not isinstance(config.sampling, Greedy):
            key = jax.random.fold_in(jax.random.key(config.seed or 0), start)
        settings: dict[str, Any] = dict(sampling=config.sampling, key=key, beyond_context=config.beyond_context)
        turn = talk.stream(tokens, max_new_tokens=new, **settings)
        clock = Clock()
        try:
            with Stops() as stops, warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Logits must be finite", RuntimeWarning)  # `failure_of` tells it
                result = self._write(turn, clock, stops)
        finally:
            if len(talk.tokens) > start:
                self._starts.append(start)
        self._before = ""
        self._tell(result, len(tokens), new, clock)
        if stops.came == signal.SIGTERM:
            raise Terminated

    def _write(self, turn: Iterator[list[int]], clock: Clock, stops: Stops) -> Generated | None:
        """Prints an answer while it is made; None where it was stopped."""
        text = self._tokenizer.stream()
        while stops.came is None:
            try:
                new = next(turn)
            except StopIteration as end:
                print(text.finish(), flush=True)
                return end.value
            clock.add(len(new))
            print(text.push(new), end="", flush=True)
        print(text.finish(), flush=True)
        return None

    def _tell(self, result: Generated | None, read: int, new: int, clock: Clock) -> None:
        """How the answer went, on standard error."""
        if result is not None and has_failed(result):
            print(failure_of(result, "chat"), file=sys.stderr)
        if not self._config.stats:
            return
        used = len(self.conversation.tokens)
        print(f"[{read} message tokens; {clock.of_tokens}; {used} of {self.room} tokens in use]", file=sys.stderr)
        ended = result is None or int(result.lengths[0]) < new or self.conversation.tokens[-1] in self._ends
        if not ended:
            why = "--max-new-tokens" if new == self._config.max_new_tokens else "the chat is full"
            print(f"[the answer was cut at {new} tokens: {why}]", file=sys.stderr)

    @property
    def _ends(self) -> tuple[int, ...]:
        return self.conversation.model.config.eos_token_ids

    def _left(self, used: int) -> int:
        """New tokens that there is room for behind `used` ones; the cache need not hold the last one."""
        talk = self.conversation
        by_cache, by_context = talk.capacity - used + 1, talk.model.config.context - used
        return by_cache if self._config.beyond_context else min(by_cache, by_context)

    def _full(self, used: int, more: int) -> str:
        context, needed = self.conversation.model.config.context, 2 * (used + more)
        taken = f"The chat must have room for the message, {more} tokens, and an answer; got {self.room} tokens, {used} of them in use."
        if self._config.beyond_context or used + more < context:
            needed = needed if self._config.beyond_context else min(needed, context)
            remedy = f"go on with more room: /save FOLDER, then {self._command_line('FOLDER')} --capacity {needed}"
        else:
            remedy = f"start a new chat; the model's context is {context} tokens"
        return f"{taken} Shorten the message, take earlier ones back with /undo, or {remedy}."
