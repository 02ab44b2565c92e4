"""Recognises secrets by their key or their form, and keeps them out of files and messages."""

import os
import re
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

BLOT = "***"
NESTED = "fedlight.secret"  # the resolver of a variable that holds a list or a mapping
WORDS = {"passphrase", "passwd", "password", "secret", "credential", "webhook"}
"""A key with one of these words is secret."""
LAST = {"auth", "authorization", "bearer", "cookie", "pat", "pwd", "token"}
"""A key that ends in one of these words is secret."""
OF = {"access", "account", "api", "auth", "aws", "bearer", "encryption", "hf", "personal", "private"}
OF |= {"refresh", "secret", "service", "session", "signing", "ssh", "storage", "wandb"}
"""After one of these, or in one word with it, `key`, `keys` and `tokens` are secret."""
SIGNED = {"key", "sig", "signature"}  # last words that are secret in the query of a URL alone

QUOTED = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
KEYED = re.compile(r"([^\s:,{}\[\]'\"=/]+)\s*:\s*")
"""A key within {...} on Hydra's command line, up to its value."""
SCALAR = re.compile(rf"\$\{{[^}}]*\}}|{QUOTED}|(?:[^,{{}}\[\]\\]|\\.)+")
"""Its value, where that is neither a list nor a mapping."""
ITEM = re.compile(rf"[\[{{,:]\s*({QUOTED}|[^,:{{}}\[\]]+?)\s*(?=[,\]}}])")
"""A value within a list or a mapping."""
USER = re.compile(r"(?<=://)([^\s/?#@:'\"]*:[^\s/?#'\"]*|[^\s/?#@:'\"]{16,})(?=@)")
"""In a URL, user:password, or a token in the place of both."""
ASSIGNED = re.compile(r"((?:^|[?&;#,\s])([^\s?&;#,=:/'\"]+)=)((?!\$\{)[^\s?&;#,'\"\]}]+)")
"""name=value, as in the query of a URL."""
HEADER = re.compile(r"(?i)(\bbearer\s+|\bauthorization\s*[:=]\s*(?:\w+\s+)?)([\w.~+/=-]{8,})")
SHORTEST = 4  # characters of a secret that is looked for in messages

_known_secrets: set[str] = set()
"""Secrets that this process has masked so far; global, since any error message may quote them."""


def is_secret(key: str) -> bool:
    """Whether the value under a key, such as `logger.api_key` or `AWS_SECRET_ACCESS_KEY`, is a secret.

    The words of its last part decide, plurals and camelCase included: one of WORDS anywhere, one of LAST at
    the end, or `key` or `tokens` after one of OF. `num_tokens`, `token_dim`, `key_dim` and `PWD` are none.
    """
    words = _words(key)
    if not words or key == "PWD":  # of the shell: the working folder
        return False
    plain = [word if word.endswith("ss") else word.removesuffix("s") for word in words]
    if WORDS.intersection(plain) or ("key" in plain and OF.intersection(plain[: plain.index("key")])):
        return True
    if words[-1] == "tokens":
        return len(words) == 1 or bool(OF.intersection(words))
    return plain[-1] in LAST


def _words(key: str) -> list[str]:
    """The words of the last part of a dotted key; `apikey` and the like are two."""
    name = re.sub(r"([a-z0-9])([A-Z])|([A-Z])([A-Z][a-z])", r"\1\3_\2\4", key.rpartition(".")[2]).lower()
    parted = re.sub(rf"(?<![a-z0-9])({'|'.join(OF)})(keys?|tokens?)(?![a-z0-9])", r"\1_\2", name)
    return re.findall(r"[a-z0-9]+", parted)


def masked(node: Any, key: str = "") -> Any:
    """A copy of a configuration with its secrets masked; `redacted` masks them in messages from then on."""
    if isinstance(node, list):
        return [masked(value, key) for value in node]
    if node is not None and not isinstance(node, bool) and is_secret(key):
        for leaf in _leaves(node):
            _known_secrets.add(leaf)
        return BLOT
    if isinstance(node, dict):
        return {name: masked(value, str(name)) for name, value in node.items()}
    return _without_secrets(node) if isinstance(node, str) else node


def _leaves(node: Any) -> Iterator[str]:
    """Yields the values of a configuration as strings."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _leaves(value)
    elif node is not None:
        yield str(node)


def _without_secrets(text: str) -> str:
    """Masks the credentials in URLs, headers and name=value of a text, and remembers them."""

    def blot(secret: str) -> str:
        _known_secrets.add(secret)
        return BLOT

    def user(m: re.Match[str]) -> str:
        _known_secrets.add(m[1].partition(":")[2] or m[1])
        return BLOT

    def assigned(m: re.Match[str]) -> str:
        in_query = m[1][0] in "?&;#" and _words(m[2])[-1:] in [[word] for word in SIGNED]
        return m[1] + blot(m[3]) if in_query or is_secret(m[2]) else m[0]

    text = HEADER.sub(lambda m: m[1] + blot(m[2]), USER.sub(user, text))
    return ASSIGNED.sub(assigned, text)


def redacted(message: str) -> str:
    """A message without secrets: those of the environment, those masked before, and those of a known form."""
    known = set(_known_secrets)
    for name, value in os.environ.items():
        if is_secret(name):
            known.update([value, *(_unquoted(item) for item in ITEM.findall(value))])
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= SHORTEST:
            message = message.replace(value, BLOT)
    return _without_secrets(message)


def move_to_environment(arguments: Iterable[str], environment: MutableMapping[str, str]) -> list[str]:
    """Replaces each secret in arguments KEY=VALUE by a reference to an environment variable.

    Files can then quote the arguments. Processes started with them, also SLURM jobs, inherit the variables.

    Args:
        arguments: of the command line.
        environment: gets one variable for each secret, such as FEDLIGHT_SECRET_LOGGER_API_KEY.
    """
    moved: dict[str, str] = {}

    def refer(key: str, text: str) -> str:
        is_nested = text.strip()[:1] in ("[", "{")
        value = text.strip() if is_nested else _unquoted(text.strip())
        if value in ("", "null") or "${" in value:
            return text
        name = "FEDLIGHT_SECRET_" + re.sub(r"\W+", "_", key).strip("_").upper()
        while moved.setdefault(name, value) != value:
            name += "_"
        return f"${{{NESTED if is_nested else 'oc.env'}:{name}}}"

    def move(argument: str) -> str:
        key, sign, value = argument.partition("=")
        if not sign or key.startswith("-"):
            return argument
        if is_secret(key) or _without_secrets(value) != value:
            return f"{key}={refer(key, value)}"
        parts, position = [f"{key}="], 0
        while match := KEYED.search(value, position):
            parts.append(value[position : match.end()])
            position = match.end()
            if is_secret(match[1]):
                end = _end_of_value(value, position)
                parts.append(refer(f"{key}.{match[1]}", value[position:end]))
                position = end
        return "".join([*parts, value[position:]])

    done = [move(argument) for argument in arguments]
    environment.update(moved)
    return done


def _end_of_value(text: str, start: int) -> int:
    """The end of the value that begins at `start` in a mapping on Hydra's command line."""
    if text[start : start + 1] not in ("[", "{"):
        match = SCALAR.match(text, start)
        return match.end() if match else start
    depth = 0
    for token in re.compile(rf"{QUOTED}|[\[{{\]}}]").finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if not depth:
            return token.end()
    return len(text)


def _unquoted(text: str) -> str:
    """A value as Hydra reads it from the command line."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return re.sub(r"\\([\\()\[\]{}:=,\s])", r"\1", text)
