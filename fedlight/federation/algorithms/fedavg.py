"""Federated averaging (FedAvg, arXiv 1602.05629): the base of all algorithms, which override parts of it."""

from lightning import Callback

from fedlight.federation.messages import State


class FedAvg:
    """Clients train as they are, and the mean of their updates is the new global model.

    Every tensor below is a parameter of the slices that the method exchanges in that round: what a client
    keeps private takes no part, and buffers are averaged whatever the algorithm. A client's `memory` and the
    server's own `state` are carried from round to round and belong to the algorithm alone; `extras` are what
    the algorithm sends beside the slices, counted in the ledger under the name `algorithm`. An entry of
    `extras` or `memory` that is named like a parameter, or `<kind>/<parameter>`, is dropped where that
    parameter is not exchanged (after a warm start, for example).

    Attributes:
        keeps_memory: whether clients carry something from round to round for this algorithm.
        absent_is_zero: whether a client that does not report an extra counts in its mean, with 0.
    """

    keeps_memory = False
    absent_is_zero = False

    def init(self, theta: State) -> State:
        """The server's own state before the first round; `theta` is the first global model."""
        return {}

    def broadcast(self, state: State) -> State:
        """The extras that every client of the cohort receives."""
        return {}

    def aux_like(self, theta: State) -> State:
        """Tensors like the extras that a client reports, which client-level privacy must know beforehand."""
        return {}

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        """What is added to the client's Trainer; the names of `received` are those of its state_dict.

        What `report` is to know of the fit are tensors in the `state_dict()` of a callback.
        """
        return []

    def report(
        self, received: State, trained: State, aux: State, memory: State, steps: int
    ) -> tuple[State, State]:
        """The extras that a client reports, floating, since the server takes their mean; and its new memory.

        Args:
            received: the slices that the client reports, as they were received.
            trained: the same after the local epochs.
            aux: what `broadcast` sent.
            memory: what this client kept in its last round, nothing in its first; and what its `callbacks`
                hold.
            steps: optimizer steps of this local update.
        """
        return {}, memory

    def forget(self, state: State, round_: int) -> State:
        """The server's state after a round, 1..R, in which a client's memory turned out to be lost."""
        return state

    def weight(self, num_examples: int) -> float:
        """The weight of an update with n_k images in the mean."""
        return num_examples

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        """The new values of the slices that were reported, and the server's new state.

        Args:
            theta: the global model before the round.
            mean: the weighted mean of the updates; a tensor that nobody reported is absent.
            aux: the mean, with the same weights, of what clients reported beside the slices.
            state: the server's own.
        """
        return mean, state
