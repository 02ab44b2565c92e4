"""Slices: named, disjoint parts of a state_dict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module

from fedlight.runtime.errors import BadInput


@dataclass(frozen=True)
class SliceMap:
    """The slice of each tensor of a state_dict.

    Attributes:
        names: slice: its state_dict names, in the order of the state_dict.
        private: state_dict names that belong to no slice and are never sent.
        buffers: state_dict names of buffers, such as running statistics: they are averaged and sent
            uncompressed, and no optimizer steps them.
    """

    names: dict[str, tuple[str, ...]]
    private: tuple[str, ...] = ()
    buffers: frozenset[str] = frozenset()

    @classmethod
    def build(
        cls,
        prefixes: Mapping[str, Sequence[str]],
        state_names: Iterable[str],
        private: Sequence[str] = (),
        buffers: Iterable[str] = (),
    ) -> "SliceMap":
        """Assigns every state_dict name to its slice by prefix; prefixes end at dots.

        Args:
            prefixes: slice: prefixes of names; `downs` covers `downs.0.weight`, not `downsample`.
            state_names: all names of the state_dict.
            private: prefixes of the names that are private in every method.
            buffers: state_dict names of buffers.

        Raises:
            BadInput: a name belongs to no slice or to two, or a slice has no name.
        """
        names: dict[str, list[str]] = {name: [] for name in prefixes}
        private_names = []
        for state_name in state_names:
            if _covered(state_name, private):
                private_names.append(state_name)
                continue
            owners = [slice_ for slice_, p in prefixes.items() if _covered(state_name, p)]
            if len(owners) != 1:
                where = f"in slices {' and '.join(owners)}" if owners else "in no slice"
                raise BadInput(
                    f"model.slices: parameter {state_name} is {where}; each belongs to exactly one of "
                    f"{', '.join(prefixes)}"
                )
            names[owners[0]].append(state_name)
        for slice_, members in names.items():
            if not members:
                raise BadInput(f"model.slices: slice {slice_} has no parameter of the model")
        slices = {slice_: tuple(members) for slice_, members in names.items()}
        return cls(slices, tuple(private_names), frozenset(buffers))

    def select(self, slices: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of `state` that belong to `slices`."""
        return {name: state[name] for slice_ in slices for name in self.names[slice_]}

    def parameters(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of `state` without buffers."""
        return {name: tensor for name, tensor in state.items() if name not in self.buffers}

    def auxiliary(self, slices: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an algorithm that belong to `slices`, or to no single slice.

        A tensor belongs to a state_dict name if its own name is that name, or `<kind>/<that name>`; otherwise
        it belongs to the model.
        """
        others = {name for slice_ in self.names.keys() - set(slices) for name in self.names[slice_]}
        return {name: tensor for name, tensor in tensors.items() if name.split("/", 1)[-1] not in others}


def buffer_names(module: Module) -> set[str]:
    """The state_dict names of a module that are not parameters."""
    parameters = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return module.state_dict().keys() - set(parameters)


def _covered(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
