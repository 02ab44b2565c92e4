"""The errors of fedlight; the user sees each as one line."""


class FedlightError(Exception):
    """The base class of all errors that fedlight raises on purpose; the message is one line."""


class BadInput(FedlightError, ValueError):
    """The input is invalid; the message names the key, the value and what is allowed."""


class Diverged(FedlightError, RuntimeError):
    """Training produced numbers that are not finite; the message names round and client."""


class Damaged(FedlightError, RuntimeError):
    """A stored file is missing or damaged, or a message is invalid; the message names it."""


class MemoryLost(Damaged):
    """The memory of a client is lost; the server has to go back to an earlier round."""


class LeaseTaken(FedlightError, OSError):
    """Another process works on the cell, or has taken its lease over; the message names it."""


class ExtensionFailed(FedlightError, RuntimeError):
    """User code raised in training; the message names the code, the error and where to read more."""


class ClientFailed(FedlightError, RuntimeError):
    """A client's task failed on a worker; the message names client and round."""


class CellFailed(Exception):
    """A cell of a sweep ended in an error that was printed already.

    Attributes:
        status: exit status of the command.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


KNOWN = (BadInput, ClientFailed, Damaged, Diverged, ExtensionFailed)
"""Errors whose message is shown without their type."""


def first_cause(error: BaseException) -> BaseException:
    """The first error of KNOWN in a chain of causes, else the last cause."""
    while error.__cause__ is not None and not isinstance(error, KNOWN):
        error = error.__cause__
    return error


def raised_by_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised an error; it is then about the command line."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4")


def format_error(error: BaseException) -> str:
    """The type and message of an error of other code than fedlight's, on one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}{': ' if words else ''}{words}; HYDRA_FULL_ERROR=1 shows the traceback"
