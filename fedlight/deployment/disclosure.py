"""What leaves an institution under an agreement, in words: the preview of `fedlight deploy check`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fedlight.config import CellConfig
from fedlight.deployment.deployable import agreed_classes
from fedlight.deployment.institution import MODELS
from fedlight.experiment.expected_traffic import ExpectedUpdates
from fedlight.experiment.mechanisms import listed_nodes
from fedlight.experiment.parts import CellParts
from fedlight.experiment.server_view import describe_server_view, describe_signing
from fedlight.federation.secure.signatures import load_signer
from fedlight.runtime.errors import BadInput


def describe_data(config: CellConfig, parts: CellParts, client: int, root: Path | None) -> str:
    """Two lines on the images that an institution trains on: their number, their place, their classes.

    Args:
        config: of the agreement.
        parts: of the institution's cell.
        client: the institution's number.
        root: folder of its images, or None for its share of a public data set.

    Raises:
        BadInput: there are no images.
    """
    indices = parts.client_indices[client]
    if not len(indices):
        place = root or config.data.name
        raise BadInput(f"client {client} would train on no image: {place} holds none for it")
    source = root or f"the share of client {client} in {config.data.name}, partitioned as in a simulation"
    classes = parts.dataset.classes
    counts = np.bincount(parts.dataset.train.labels[indices], minlength=len(classes))
    listed = ", ".join(f"{name} {count}" for name, count in zip(classes, counts, strict=True))
    numbered = "as agreed" if agreed_classes(config) else "of this institution; none were agreed"
    return (
        f"data           {len(indices)} images of {config.data.shape} to train on, from {source}\n"
        f"classes        {listed} ({numbered})"
    )


def describe_key(config: CellConfig, client: int, key: Path | None) -> Iterator[str]:
    """A line on the key of the institution's node; none where the agreement lists no keys.

    Args:
        config: of the agreement.
        client: the institution's number.
        key: the private key of its node, or None to check none.

    Raises:
        BadInput: the agreement lists another key for the client, or none at all.
    """
    nodes = listed_nodes(config)
    if nodes is None:
        if key:
            raise BadInput("the agreement lists no keys of nodes (transport.nodes): leave --key out")
        return
    if key:
        yield f"key            {load_signer(key, client, nodes).fingerprint}, as agreed"
    else:
        yield f"key            {nodes[client]} was agreed; add --key node.key to compare yours"


def describe_disclosure(config: CellConfig, parts: CellParts, client: int) -> Iterator[str]:
    """Line by line what leaves a client in each round, what leaves at the end, and what never leaves."""
    slices, method, updates = parts.slices.names, parts.method, ExpectedUpdates(parts)
    state = parts.ranks.cut(client, parts.model.state_dict())
    view = describe_server_view(config)
    masked = ", masked" if view else ""
    yield f"leaves, in each of up to {config.rounds} rounds{masked}:"
    for slice_ in method.uplink:
        size = f"{updates.payload(client, slice_).bytes:,} bytes"
        if config.transform and config.transform.up:
            size = f"about {size}, encoded"
        params = sum(state[name].numel() for name in slices[slice_])
        yield f"  {slice_:12} {params:,} trained parameters, {size}"
    if aux := parts.algorithm.aux_like({n: state[n] for s in method.uplink for n in slices[s]}):
        numbers = sum(tensor.numel() for tensor in aux.values())
        yield f"  {'algorithm':12} {numbers:,} numbers of auxiliary state"
    if view:
        hidden = "" if config.privacy else ", likewise of the numbers of images and the losses"
        yield f"the server sees {view}, and no single update{hidden}"
        yield "leaves, encrypted for the others: shares of the keys of its masks, which unmask sums alone"
        yield describe_signing(config)
    elif not config.privacy:
        yield "  the number of images, the mean training loss"
    if method.evaluate == "clients":
        due = f"and every {config.evaluation.every} rounds" if config.evaluation.every else "once"
        drawn = config.evaluation.grid or config.evaluation.samples
        scores = "images drawn from its own model and their scores, " if drawn else ""
        yield (
            f"leaves at the end, {due}: {scores}the fingerprint of its own model, each with up to {MODELS} "
            "versions of the global slices"
        )
    private = [slice_ for slice_ in slices if slice_ not in method.uplink]
    if method.warm_start:
        yield f"leaves in the first {method.warm_start} rounds alone: {', '.join(private) or 'nothing'}"
        private = []
    yield f"never leaves: the images{''.join(f', {slice_}' for slice_ in private)}"
