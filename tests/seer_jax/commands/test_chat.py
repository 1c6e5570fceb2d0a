"""`seer-jax chat`: one conversation over lines of a pipe or a terminal, signals, folders, and what is refused."""

import builtins
import io
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from seer_jax import Conversation, Transformer, from_pretrained, load_tokenizer
from seer_jax.commands import main as cli
from seer_jax.commands.chat.input import messages
from seer_jax.folder_lock import locked
from seer_jax.selection.rules import TokenBudget, TopK

pytestmark = [pytest.mark.usefixtures("compile_quickly"), pytest.mark.cpu]

MESSAGES = ["import os", "def f(x):", "# and then?"]
SIZES = ["--capacity", "256", "--prefill-chunk", "64"]
GATES = ["prefill", "decode"]


class Lines(io.StringIO):
    """Standard input of these lines."""

    def __init__(self, *lines: str, terminal: bool = False):
        super().__init__("".join(f"{line}\n" for line in lines))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def chat(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command with these lines on a pipe; (exit code, standard output, standard error)."""

    def run(lines: list[str], *options: str, new: int = 6, sizes: list[str] = SIZES) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", Lines(*lines))
        names = ["--model", str(saved / "base"), "--gates", *(str(saved / gate) for gate in GATES)]
        code = cli.main(["chat", *names, "--max-new-tokens", str(new), *sizes, *options])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def model(saved: Path) -> Transformer:
    return from_pretrained(saved / "base", [saved / gate for gate in GATES], dtype=jnp.float32)


def test_turns_are_those_of_a_conversation(chat: Callable[..., Any], model: Transformer, saved: Path, tmp_path: Path):
    """Also where one process goes on with what another one saved, and where a turn was taken back."""
    tokenizer = load_tokenizer(saved / "base")
    policies: dict[str, Any] = dict(prefill=TopK(0.4), decode=TokenBudget(32))
    talk, expected = Conversation(model, 256, prefill_chunk=64, **policies), []
    for message in MESSAGES:
        tokens = tokenizer.encode_turn(message, talk.tokens, system="Be brief.")
        (new,) = talk.generate(tokens, max_new_tokens=6).rows()
        expected.append(tokenizer.decode(new) + "\n")

    folder = str(tmp_path / "talk")
    code, out, err = chat(MESSAGES[:2], "--system", "Be brief.", "--save", folder)
    assert (code, out) == (0, "".join(expected[:2]))
    assert err.startswith("prefill: topk:0.4 (recommended by the gate)\ndecode: budget:32 (recommended by the gate)\n[")
    assert re.search(r"\n\[\d+ message tokens; 6 new, the first after .* tokens/s; \d+ of 256 tokens in use\]\n", err)
    names = f"--model {saved / 'base'} --gates {saved / 'prefill'} {saved / 'decode'}"
    assert err.endswith(
        f"[the answer was cut at 6 tokens: --max-new-tokens]\nSaved; go on with seer-jax chat {names} --load {folder}\n"
    )
    text = tmp_path / "and.txt"
    text.write_text("# and\n")
    lines = ["", "something else", "/undo", MESSAGES[2]]
    code, out, err = chat(lines, "--load", folder, "--no-stats", sizes=[])
    assert (code, out.partition("\n")[2], err) == (0, expected[2], "")


def test_a_message_of_several_lines_and_of_a_file(saved: Path, chat: Callable[..., Any], tmp_path: Path):
    (tmp_path / "text").write_text("import os\nimport sys\n\n")
    one = chat([f"/read {tmp_path / 'text'}", "def f(x):\\", "    return"], "--no-stats")
    two = chat(["import os\\", "import sys\\", "\\", "def f(x):\\", "    return"], "--no-stats")
    assert one == two and one[0] == 0 and one[1]


@pytest.mark.parametrize(
    ("number", "times", "code", "answers", "line"),
    [
        (signal.SIGINT, 1, 0, 2, ""),
        (signal.SIGINT, 2, 130, 1, "seer-jax chat: interrupted.\n"),
        (signal.SIGTERM, 1, 143, 1, "seer-jax chat: terminated.\n"),
    ],
    ids=["Ctrl-C", "Ctrl-C twice", "SIGTERM"],
)
def test_a_signal_stops_the_answer(
    number: int,
    times: int,
    code: int,
    answers: int,
    line: str,
    chat: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
):
    """Ctrl-C that alone, a second one and SIGTERM the chat too; what was made is kept."""
    stream, made = Conversation.stream, []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background would ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupted(self: Conversation, tokens: list[int], **settings: Any) -> Iterator[list[int]]:
        pieces = stream(self, tokens, chunk=1, **settings)
        made.append(0)
        for piece in pieces:
            made[-1] += len(piece)
            if len(made) == 1:
                for _ in range(times):
                    signal.raise_signal(number)
            yield piece

    monkeypatch.setattr(Conversation, "stream", interrupted)
    got = chat(MESSAGES[:2], "--no-stats", "--save", str(tmp_path / "talk"))
    assert (got[0], got[2], len(made), made[0]) == (code, line, answers, 1)
    assert (tmp_path / "talk" / "conversation.json").is_file()


def test_a_terminal_asks_for_messages(chat: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Ctrl-C discards a line, and what is wrong with a line is told; a text that does not fit can be dropped; Ctrl-D ends the chat."""
    (tmp_path / "book").write_text("x = 1 " * 200)
    too_long = [f"/read {tmp_path / 'book'}", "# and?", "/undo"]
    typed = iter([KeyboardInterrupt(), "/undo", "/read /nowhere", "/help", *too_long, MESSAGES[0], EOFError()])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(Lines, "isatty", lambda self: True)
    code, out, err = chat([])
    assert code == 0 and out.count("\n") == 2
    told = [
        "Room for 256 tokens",
        "(Ctrl-D ends",
        "There must be a message",
        "'/nowhere'. Check the path.",
        "/undo  ",
        "must have room for the message",
        "6 new",
    ]
    assert [text for text in told if text not in err] == []


def test_ctrl_c_discards_all_lines_of_a_message(monkeypatch: pytest.MonkeyPatch):
    typed = iter(["x\\", KeyboardInterrupt(), "a\\", "b", EOFError()])

    def ask(prompt: str) -> str:
        if isinstance(line := next(typed), BaseException):
            raise line
        return line

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(sys, "stdin", Lines(terminal=True))
    assert list(messages()) == ["a\nb"]


REFUSED = [
    (
        ["/und"],
        [],
        1,
        "There is no command '/und'; they are /read FILE, .* Begin a message that starts with / with a space",
    ),
    (["/read"], [], 1, "A command must be written /read FILE; got '/read'"),
    (["/undo 2"], [], 1, "A command must be written /undo; got '/undo 2'"),
    (["/undo"], [], 1, "There must be a message of this chat to take back; got none"),
    (
        ["x = 1 " * 200],
        [],
        1,
        r"must have room for the message, \d+ tokens, and an answer; got 256 tokens, 0 of them in use\. Shorten .* /undo, or go on with more "
        r"room: /save FOLDER, then seer-jax chat --model \S+ --gates \S+ \S+ --load FOLDER --capacity \d+\.",
    ),
    (["x = 1 " * 9000], ["--capacity", "9000"], 1, "or start a new chat; the model's context is 8192 tokens"),
    (
        ["x = 1 " * 9000],
        ["--capacity", "99"],
        1,
        "99 tokens, 0 of them in use.* or start a new chat; the model's context",
    ),
    (
        ["x = 1 " * 9000],
        ["--capacity", "99", "--beyond-context"],
        1,
        r"--beyond-context --load FOLDER --capacity \d{5,}\.",
    ),
    (
        [],
        ["--load", "x", "--prefill", "dense", "--system", "y"],
        2,
        "--system and --prefill must be left out with --load",
    ),
    ([], ["--load", "/nowhere"], 1, "A conversation's folder must hold conversation.json; /nowhere has none"),
    ([], ["--capacity", "0"], 2, "--capacity must be at least 1; got 0"),
    ([], ["--prefill-chunk", "-1"], 1, r"--prefill-chunk must be an integer of at least 0 \(0: .*\); got -1"),
    ([], ["--prefill-chunk", "24"], 1, "chunk must be a multiple of 16 tokens, whole blocks; got 24"),
    ([], ["--model", "tiny-lm", "--gates", "tiny-lm"], 1, "A conversation needs a chat template"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("lines", "options", "code", "message"), REFUSED, ids=[m[:40] for *_, m in REFUSED])
def test_what_is_refused_is_one_line(
    lines: list[str], options: list[str], code: int, message: str, chat: Callable[..., Any]
):
    sizes = [] if "--load" in options else SIZES
    got, out, err = chat(lines, "--no-stats", *options, sizes=sizes)
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert re.match(f"seer-jax chat: .*{message}", err), err


def test_other_conversations_are_not_written_over(chat: Callable[..., Any], tmp_path: Path, model: Transformer):
    """Neither by a chat that begins anew, nor by one that goes on with another; nor do two chats end in one folder."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        Conversation(model, 256, prefill_chunk=64).save(folder)
    for lines, options in (
        ([], ["--save", str(mine)]),
        ([], ["--load", str(mine), "--save", str(other)]),
        ([f"/save {other}"], ["--load", str(mine)]),
    ):
        code, out, err = chat(lines, "--no-stats", *options, sizes=[])
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert re.search(
            r"save must name a new folder, or one of this chat; got \S+, which has another conversation", err
        )
    both = ["--load", str(mine), "--save", str(mine)]
    with locked(mine):
        code, _, err = chat([], *both, sizes=[])
    assert code == 1 and "A folder must belong to one run at a time; process" in err and "give another --save" in err
    assert chat([f"/save {mine}", f"/save {tmp_path / 'new'}", f"/save {tmp_path / 'new'}"], *both, sizes=[])[0] == 0


@pytest.mark.slow
def test_an_answer_takes_the_room_that_is_left(chat: Callable[..., Any]):
    code, _, err = chat([MESSAGES[0], "x"], new=10**6)
    assert code == 1 and "[the answer was cut at" in err and "the chat is full]" in err
    assert re.search(r"256 tokens, 257 of them in use", err)
