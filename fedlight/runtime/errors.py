"""The ways in which a cell fails; the user sees each as one line."""


class BadInput(ValueError):
    """What was asked cannot be done; the message says what was wrong and what is allowed."""


class Diverged(RuntimeError):
    """Training left the finite numbers; the message names round and client."""


class Damaged(RuntimeError):
    """A file of a checkpoint is missing, or does not hold what was written; the message names it."""


class MemoryLost(Damaged):
    """What a client kept between rounds is gone; the server has to go back to an earlier round."""


class LeaseTaken(OSError):
    """Another process works on the cell, or has taken its lease over; the message names it."""


class ExtensionFailed(RuntimeError):
    """Code of the user's own raised in training; the message names it, what came and where to read more."""


class ClientFailed(RuntimeError):
    """A client's task failed on a worker; the message names client and round."""


class CellFailed(Exception):
    """A cell of a sweep ended in an error that was printed already.

    Attributes:
        status: the exit status that it means.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


KNOWN = (BadInput, ClientFailed, Damaged, Diverged, ExtensionFailed)
"""Errors whose message says it all."""


def first_cause(error: BaseException) -> BaseException:
    """The error that began it, or the first of ours on the way there."""
    while error.__cause__ is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error


def raised_by_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf itself raised an error: it then is about what was typed."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def format_error(error: BaseException) -> str:
    """An error out of code that is not fedlight's, in words."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if words else ''}{words}; HYDRA_FULL_ERROR=1 shows the traceback"
