"""The step of the global model at the end of a round."""

from fedlight.federation.algorithms.fedavg import FedAvg
from fedlight.federation.messages import State
from fedlight.federation.slices import SliceMap
from fedlight.runtime.errors import BadInput


def step_model(
    algorithm: FedAvg,
    slices: SliceMap,
    theta: State,
    parameters: State,
    mean: State,
    aux: State,
    state: State,
) -> tuple[State, State]:
    """theta <- algorithm.step(theta, mean); buffers take their mean.

    Args:
        algorithm: steps the parameters.
        slices: the slice map of the model.
        theta: the global model before the round, all slices.
        parameters: the part of it that the algorithm steps.
        mean: of the updates; a tensor that no client reported is absent.
        aux: mean of the auxiliary state.
        state: of the algorithm.

    Returns:
        The global model after the round, and the new state of the algorithm.

    Raises:
        BadInput: the algorithm, which may be user code, returned tensors that do not fit the model.
    """
    mean_parameters = slices.parameters(mean)
    stepped, state = algorithm.step(parameters, mean_parameters, aux, state)
    _check_step(algorithm, stepped, theta)
    buffers = {name: tensor for name, tensor in mean.items() if name not in mean_parameters}
    return theta | buffers | stepped, state


def _check_step(algorithm: FedAvg, stepped: State, theta: State) -> None:
    who = f"algorithm {type(algorithm).__module__}.{type(algorithm).__qualname__}"
    for name, tensor in stepped.items():
        kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        if name not in theta:
            raise BadInput(f"{who}: step returned {name} of {kind}, which is no part of the global model")
        expected = f"{theta[name].dtype} of shape {tuple(theta[name].shape)}"
        if kind != expected:
            raise BadInput(f"{who}: step returned {kind} for {name}, expected {expected}")
