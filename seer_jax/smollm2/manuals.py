"""Text for the gates of SmolLM2 and for their evaluation: English manuals from Debian 12, split into training pages and held-out pages.

    python -m seer_jax.smollm2.manuals text     # needs apt-get and dpkg; downloads 87 MB

writes text/train.jsonl (a page in each line) and text/heldout.txt. A page is held out by the digest of its name, one in twelve, and pages are
ordered by the same digests, so that neither depends on the order of files and any stretch of a file has pages of all packages.
"""

import gzip
import hashlib
import html.parser
import json
import pathlib
import re
import subprocess
import sys
import tempfile

PACKAGES = (
    "linux-doc-6.1",
    "python3.11-doc",
    "postgresql-doc-15",
    "maxima-doc",
    "octave-doc",
    "debian-reference-en",
    "dict-gcide",
)
HELD_OUT = 12  # one page in so many
SHORTEST = 500  # characters; shorter pages are menus and redirects
DICTIONARY_PAGE = 40_000  # characters


class Text(html.parser.HTMLParser):
    """The text of a page, without navigation, scripts and styles."""

    SKIPPED = frozenset(("script", "style", "head", "nav", "footer"))
    BREAKS = frozenset(("p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "br", "dt", "dd", "table"))

    def __init__(self) -> None:
        """Without text so far."""
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.SKIPPED:
            self.skipped += 1
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SKIPPED and self.skipped:
            self.skipped -= 1
        if tag in self.BREAKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.parts.append(data)


def page_text(source: str) -> str:
    """The text of an HTML page, without trailing blanks and with at most one empty line in a row."""
    parser = Text()
    parser.feed(source)
    lines = (re.sub(r"[ \t\xa0]+$", "", line) for line in "".join(parser.parts).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def pages(folder: pathlib.Path) -> dict[str, str]:
    """Texts by name, of one package."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file() or "translations" in name or "genindex" in name:
            continue
        if path.suffix == ".html":
            found[name] = page_text(path.read_bytes().decode("utf-8", "replace"))
        elif path.suffix == ".dz":
            whole = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            for i in range(0, len(whole), DICTIONARY_PAGE):
                found[f"{name}:{i}"] = whole[i : i + DICTIONARY_PAGE]
    return found


def digest(name: str) -> int:
    """64 bits that tell pages apart and order them."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def main(target: str) -> None:
    """Writes both files."""
    out = pathlib.Path(target)
    out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        for archive in sorted(pathlib.Path(work).glob("*.deb")):
            folder = pathlib.Path(work, archive.name.partition("_")[0])
            subprocess.run(["dpkg", "-x", archive, folder], check=True)
            texts |= {f"{folder.name}/{name}": text for name, text in pages(folder).items() if len(text) >= SHORTEST}
    names = sorted(texts, key=lambda name: (digest(name), name))
    seen: set[str] = set()
    train, held = [], []
    for name in names:
        if texts[name] in seen:
            continue
        seen.add(texts[name])
        (held if digest(name) % HELD_OUT == 0 else train).append(texts[name])
    (out / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train), encoding="utf-8")
    (out / "heldout.txt").write_text("\n".join(held), encoding="utf-8")
    print(
        f"{len(train)} pages, {sum(map(len, train)):,} characters to train on; {len(held)}, {sum(map(len, held)):,} held out"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
