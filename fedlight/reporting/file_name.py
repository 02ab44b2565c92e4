"""Texts as parts of file names of a report."""

import hashlib
import re


def file_name(text: str) -> str:
    """A text as a part of a file's name: shortened, with a hash, where it is long or holds odd characters."""
    if re.fullmatch(r"[\w-][\w.-]{0,99}", text):
        return text
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9]+', '_', text)[:80]}_{digest}"
