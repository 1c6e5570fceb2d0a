"""Text files: UTF-8 is read, and what is no UTF-8 is refused with file, place and remedy."""

from pathlib import Path

import pytest

from seer_jax.text_files import read_text

TEXT = "ünï\n🦜"
READ = {
    "plain": TEXT.encode(),
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "line ends of Windows": "ünï\r\n🦜".encode(),
    "line ends of old Macs": "ünï\r🦜".encode(),
}


@pytest.mark.parametrize("name", READ)
def test_utf8_is_read(name: str, tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(READ[name])
    assert read_text(tmp_path / "a.txt") == TEXT


REFUSED = {
    "Latin-1": (
        "a\nünï".encode("latin-1"),
        r"byte 0xfc at position 2, line 2 is not. Where it is Latin-1, convert it: iconv -f LATIN1",
    ),
    "cut short": ("ü".encode()[:1], "byte 0xc3 at position 0 is not"),
    "after a mark": (b"\xef\xbb\xbfa\xff", "byte 0xff at position 4 is not"),
    "UTF-16": (TEXT.encode("utf-16"), "it is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 '.*a.txt' > NEW"),
    "UTF-16 without a mark": (
        "abc".encode("utf-16-le"),
        "got a zero byte at position 1, as binary files and UTF-16 have",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "got a zero byte at position 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_is_refused(name: str, tmp_path: Path):
    data, message = REFUSED[name]
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=f"a.txt must be UTF-8 text; {message}"):
        read_text(tmp_path / "a.txt")
