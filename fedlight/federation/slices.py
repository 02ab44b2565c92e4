"""Slices: named, disjoint parts of a state_dict."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedlight.runtime.errors import BadInput


@dataclass(frozen=True)
class SliceMap:
    """Which tensor of a state_dict belongs to which slice.

    Attributes:
        names: slice -> its state_dict names, in the order of the state_dict.
        private: the state_dict names that belong to no slice and never leave a client.
    """

    names: dict[str, tuple[str, ...]]
    private: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        prefixes: Mapping[str, Sequence[str]],
        state_names: Iterable[str],
        private: Sequence[str] = (),
    ) -> "SliceMap":
        """Sorts every state_dict name into its slice by prefix, cut at dots.

        Args:
            prefixes: slice -> prefixes of names; `downs` covers `downs.0.weight`, not `downsample`.
            state_names: all names of the state_dict.
            private: prefixes of the names that stay with the client whatever the method.

        Raises:
            BadInput: a name in no slice or in two, or a slice without a name.
        """
        names: dict[str, list[str]] = {name: [] for name in prefixes}
        kept = []
        for state_name in state_names:
            if _covered(state_name, private):
                kept.append(state_name)
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
                raise BadInput(f"model.slices: slice {slice_} holds no parameter of the model")
        return cls({slice_: tuple(members) for slice_, members in names.items()}, tuple(kept))

    def select(self, slices: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The entries of `state` that belong to `slices`."""
        return {name: state[name] for slice_ in slices for name in self.names[slice_]}


def _covered(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
