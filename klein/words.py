"""Words of other libraries' errors, made fit for a sentence."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first sentence of an error without its full stop; the name of its type where it has no text.

    >>> first_line(ValueError("it is empty. Give another."))
    'it is empty'
    """
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate, as file names of raw bytes do.

    >>> is_unicode("\\udc80")
    False
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
