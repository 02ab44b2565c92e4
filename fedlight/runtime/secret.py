"""What is secret, by the name of its key, and how it is kept out of every file and every message."""

import os
import re
from collections.abc import Iterable, MutableMapping
from typing import Any

BLOT = "***"
WORDS = {"apikey", "password", "passwd", "passphrase", "secret", "credential", "credentials"}
KEYS = {"api", "access", "account", "auth", "aws", "encryption", "private", "secret", "signing", "ssh"}
INSIDE = re.compile(
    r"([\w.]+)(\s*:\s*)(\$\{[^}]*\}|'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|(?:[^,{}\[\]\\]|\\.)+)"
)
"""key: value, as they stand within {...} on Hydra's command line."""
SHORTEST = 4  # characters of a secret that is looked for in messages

_seen: set[str] = set()


def is_secret(key: str) -> bool:
    """Whether the value under a key, such as `logger.api_key` or `AWS_SECRET_ACCESS_KEY`, is a secret.

    It is where a word of the last part is one of WORDS, where the last word is `token`, or where `key`
    follows one of KEYS. `num_tokens`, `token_dim` and `key_dim` are none.
    """
    name = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key.rpartition(".")[2])
    words = re.findall(r"[a-z0-9]+", name.lower())
    if not words:
        return False
    key_of = "key" in words and KEYS.intersection(words[: words.index("key")])
    return words[-1] == "token" or bool(WORDS.intersection(words) or key_of)


def masked(node: Any, key: str = "") -> Any:
    """A configuration with its secrets blotted out, which `redacted` knows from then on."""
    if node is not None and is_secret(key):
        if isinstance(node, list):
            return [masked(value, key) for value in node]
        _seen.add(str(node))
        return BLOT
    if isinstance(node, dict):
        return {name: masked(value, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [masked(value, key) for value in node]
    return node


def redacted(message: str) -> str:
    """A message without the values of secrets: those of the environment, and those that were masked."""
    known = _seen.union(value for name, value in os.environ.items() if is_secret(name))
    for value in sorted(known, key=len, reverse=True):
        if len(value) >= SHORTEST:
            message = message.replace(value, BLOT)
    return message


def move_to_environment(arguments: Iterable[str], environment: MutableMapping[str, str]) -> list[str]:
    """Arguments KEY=VALUE, in which a reference to an environment variable takes the place of each secret.

    So what is written of the arguments holds no secret, and processes that are started with them, jobs of
    SLURM among them, find it in the environment that they inherit.

    Args:
        arguments: of the command line.
        environment: gets a variable a secret, such as FEDLIGHT_SECRET_LOGGER_API_KEY.
    """
    moved: dict[str, str] = {}

    def refer(key: str, text: str) -> str:
        value = _unquoted(text.strip())
        if value in ("", "null") or "${" in value:
            return text
        name = "FEDLIGHT_SECRET_" + re.sub(r"\W+", "_", key).strip("_").upper()
        while moved.setdefault(name, value) != value:
            name += "_"
        return f"${{oc.env:{name}}}"

    def move(argument: str) -> str:
        key, sign, value = argument.partition("=")
        if not sign or key.startswith("-"):
            return argument
        if is_secret(key):
            return f"{key}={refer(key, value)}"
        return f"{key}=" + INSIDE.sub(
            lambda m: m[1] + m[2] + refer(f"{key}.{m[1]}", m[3]) if is_secret(m[1]) else m[0], value
        )

    done = [move(argument) for argument in arguments]
    environment.update(moved)
    return done


def _unquoted(text: str) -> str:
    """A value as Hydra reads it from the command line."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1].replace(f"\\{text[0]}", text[0])
    return re.sub(r"\\([\\()\[\]{}:=,\s])", r"\1", text)
