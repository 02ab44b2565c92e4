"""Federated averaging (FedAvg, arXiv 1602.05629), the base class of all algorithms."""

from lightning import Callback

from fedlight.federation.messages import State


class FedAvg:
    """Clients train without changes, and the mean of their updates is the new global model.

    An algorithm overrides some of the methods. All tensors below are parameters of the slices that the method
    exchanges in that round: private slices are excluded, and buffers are averaged by every algorithm. The
    algorithm's auxiliary state, `aux`, is sent with the slices and counted in the ledger under the name
    `algorithm`. A client's `memory` and the server's `state` are kept from round to round for the algorithm
    only. An entry of `aux` or `memory` that is named like a parameter, or `<kind>/<parameter>`, is dropped
    where that parameter is not exchanged, such as after a warm start.

    Attributes:
        keeps_memory: whether clients keep memory from round to round for this algorithm.
        absent_is_zero: whether a client that does not report an auxiliary tensor counts as 0 in its mean;
            otherwise it does not count.
        elementwise: whether its callbacks treat each element of a tensor by itself, so that they also serve
            clients that train in one computation (`trainer.fuse`), whose tensors have a further dimension.
        clients_leave: whether its elementwise callbacks also serve clients with different numbers of steps:
            those that are done are taken out of the parameters, so that a tensor that a callback keeps of all
            clients is cut by `of_present_clients`; at `on_train_end` all clients are there again.
    """

    keeps_memory = False
    elementwise = False
    clients_leave = False
    absent_is_zero = False

    def init(self, theta: State) -> State:
        """The server's state before the first round; `theta` is the initial global model."""
        return {}

    def broadcast(self, state: State) -> State:
        """The auxiliary state that every client of the cohort receives."""
        return {}

    def aux_like(self, theta: State) -> State:
        """Tensors of the names, shapes and dtypes of the auxiliary state that a client reports.

        Client-level privacy and deployments need them before the first report.
        """
        return {}

    def callbacks(self, received: State, aux: State, memory: State) -> list[Callback]:
        """Callbacks for the client's Trainer; the names in `received` are those of the module's state_dict.

        The tensors of a callback's `state_dict()` after the fit are passed to `report` in `memory`.
        """
        return []

    def report(
        self, received: State, trained: State, aux: State, memory: State, steps: int
    ) -> tuple[State, State]:
        """The auxiliary state that a client reports, and its new memory.

        Auxiliary tensors are floating, since the server takes their mean.

        Args:
            received: the slices that the client reports, as it received them.
            trained: the same slices after the local epochs.
            aux: the result of `broadcast`.
            memory: of the client's last round, empty in its first; and the states of its `callbacks`.
            steps: number of optimizer steps of this local update.
        """
        return {}, memory

    def forget(self, state: State, round_: int) -> State:
        """The server's new state after a round, 1..R, in which a client's memory was lost."""
        return state

    def weight(self, num_examples: int) -> float:
        """The weight in the mean of a client with n_k images."""
        return num_examples

    def summand(self, values: State) -> State:
        """What the mean of the round is taken of: here the reported slices, buffers included, as they are.

        The names and shapes may be others, for `step`; client-level privacy needs those of the slices.
        """
        return values

    def step(self, theta: State, mean: State, aux: State, state: State) -> tuple[State, State]:
        """The new values of the reported slices, and the server's new state.

        Args:
            theta: the global model before the round.
            mean: the weighted mean of the updates, without the tensors that no client reported.
            aux: the mean, with the same weights, of the clients' auxiliary state.
            state: the server's state before the round.
        """
        return mean, state
