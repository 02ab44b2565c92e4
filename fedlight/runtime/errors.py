"""The two ways a cell ends other than well, each told to the user in one line."""


class BadInput(ValueError):
    """What was asked cannot be done; the message says what was wrong and what is allowed."""


class Diverged(RuntimeError):
    """Training left the finite numbers; the message names round and client."""
