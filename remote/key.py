"""The key: from ``FAL_KEY``, else from a file of its own. It is read for each run and never shown."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, quote_plus

from .errors import RemoteError

VARIABLE = "FAL_KEY"
FILE = "fal_key"
SHORTEST_HIDDEN = 4  # letters; a shorter prompt is part of any sentence


def read_key(environment: Mapping[str, str], file: Path) -> str:
    """The key of the environment, else of ``file``.

    Raises:
        RemoteError: there is none, the file can be read by others, or what it holds cannot be a key. The text never
            holds the key.
    """
    key, source = environment.get(VARIABLE, "").strip(), f"the environment variable {VARIABLE}"
    if not key:
        key, source = _from_file(file), str(file)
    if not key:
        raise RemoteError(
            f"there is no fal key. Make one at fal.ai/dashboard/keys and set the environment variable {VARIABLE}, or "
            f"write it into {file}, readable only by you (chmod 600)."
        )
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise RemoteError(f"{source} holds no fal key: a line of letters, digits, '-' and ':'. Copy it again.")
    return key


def has_key(environment: Mapping[str, str], file: Path) -> bool:
    """Whether `read_key` would find a key; why it does not, only `read_key` says.

    >>> has_key({"FAL_KEY": "id:secret"}, Path("no file"))
    True
    """
    try:
        return bool(read_key(environment, file))
    except RemoteError:
        return False


def _from_file(file: Path) -> str:
    try:
        if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise RemoteError(f"other users can read {file}. Run: chmod 600 '{file}'")
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise RemoteError(f"{file} cannot be read ({type(error).__name__}); write the fal key into it again.") from None


class Secrets:
    """Takes out of messages what they must not repeat: the key, either half of it in every form, and texts.

    >>> Secrets("id:secret", ["a prompt"]).hide("bad key id%3Asecret for a prompt")
    'bad key ... for ...'
    """

    def __init__(self, key: str, texts: Sequence[str] = ()) -> None:
        halves = [part for part in key.partition(":")[::2] if part]
        self._key = _longest_first(form for secret in (key, *halves) for form in _echoes(secret))
        self._all = _longest_first([*self._key, *(form for text in texts for form in _quoted(text))])

    def hide(self, text: str) -> str:
        """A server's words on one line, without the key and the texts, and without what no file can hold."""
        text = " ".join(text.encode("utf-8", "replace").decode().split())
        return _replaced(text, self._all)

    def hide_key(self, text: str) -> str:
        """The text without the key."""
        return _replaced(text, self._key)


def _replaced(text: str, forms: Iterable[str]) -> str:
    for form in forms:
        text = text.replace(form, "...")
    return text


def _longest_first(forms: Iterable[str]) -> list[str]:
    return sorted({form for form in forms if len(form) >= SHORTEST_HIDDEN}, key=len, reverse=True)


def _quoted(text: str) -> list[str]:
    """A text as it is, as Python and as JSON quote it, on one line."""
    return [" ".join(form.split()) for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1])]


def _echoes(secret: str) -> list[str]:
    """A secret as it is, quoted, URL-encoded, and in base64 wherever it stands in a longer text."""
    encoded = [quote(secret, safe=""), quote_plus(secret)]
    return [*_quoted(secret), *encoded, *map(_lower_escapes, encoded), *_base64(secret.encode())]


def _lower_escapes(encoded: str) -> str:
    head, *rest = encoded.split("%")
    return head + "".join(f"%{part[:2].lower()}{part[2:]}" for part in rest)


def _base64(secret: bytes) -> list[str]:
    """The letters of a secret in the base64 of a text around it; they depend on where in three bytes it begins."""
    found = []
    for before, unsure in enumerate((0, 2, 3)):
        letters = base64.b64encode(bytes(before) + secret).decode()
        sure = letters[unsure : (before + len(secret)) * 8 // 6]
        found += [sure, sure.translate(str.maketrans("+/", "-_"))]
    return found
