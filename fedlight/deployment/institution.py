"""An institution in a deployment: it answers the server's messages for its one client."""

from dataclasses import dataclass
from pathlib import Path

from fedlight.data.loading import print_notes
from fedlight.deployment.agreement import check_agreed
from fedlight.deployment.answers import Answers
from fedlight.deployment.deployable import load_agreed_config
from fedlight.deployment.participants import set_up_institution
from fedlight.deployment.terms import Terms
from fedlight.experiment.clients import make_site
from fedlight.experiment.parts import CHECKPOINT
from fedlight.federation.admission import check_broadcast, check_evaluation
from fedlight.federation.messages import AUX, Broadcast, Evaluation, MaskMessage, from_bytes, to_bytes
from fedlight.federation.secure.mask_client import MaskClient
from fedlight.federation.secure.masks import hash_model
from fedlight.federation.secure.secure_sum import SecureAggregation
from fedlight.federation.secure.signatures import load_signer
from fedlight.federation.site import Site
from fedlight.runs.identity import cell_id
from fedlight.runtime.errors import BadInput, Damaged

MODELS = 2  # versions of the global slices that a client scores after a round, which may be repeated once


@dataclass(frozen=True)
class Institution:
    """Answers the server's messages for the one client of this institution.

    Under secure aggregation the update that a broadcast requests stays here, and its public keys leave; the
    masked update leaves at a later step.

    What leaves is recorded in `answers.json` and bounded by the agreement: one update in each round, in
    order, of the slices that the agreement names for it; and scores after the rounds that it names. A message
    that is repeated gets the same bytes again, since a server that restarts may go back by one round.

    Attributes:
        cell: id of the federation.
        client: its number.
        site: with its images and its memory.
        folder: of its memory.
        terms: of the agreement.
        masking: its part in secure aggregation; None without.
    """

    cell: str
    client: int
    site: Site
    folder: Path
    terms: Terms
    masking: MaskClient | None = None

    @classmethod
    def make(
        cls, path: Path, sha256: str, client: int, root: str | None, memory: Path, key: Path | None = None
    ) -> "Institution":
        """Builds the site.

        Args:
            path: of the agreement.
            sha256: of the agreement that the institution agreed to.
            client: the institution's number.
            root: folder of its images, or None.
            memory: the folder for what it keeps.
            key: the private key of its node; None where nothing is signed.

        Raises:
            BadInput: the agreement is another one, or cannot be followed here.
        """
        check_agreed(path, sha256)
        config = load_agreed_config(path, root)
        cell = cell_id(config.plain())
        parts = set_up_institution(config, client)
        masking = make_masking(parts.aggregation, client, key) if parts.aggregation else None
        folder = memory / cell
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        print_notes(parts.dataset)
        terms = Terms.make(config, parts.method, tuple(parts.slices.names))
        return cls(cell, client, make_site(parts, folder), folder / CHECKPOINT, terms, masking)

    def answer(self, content: bytes) -> bytes:
        """The update, or the scores, that a message requests.

        Raises:
            Damaged: this is no message for this client, or it requests what the agreement does not provide
                for, or what has left already.
            MemoryLost: what the client kept is gone.
        """
        message = self.read(content)
        with Answers(self.folder).opened() as answers:
            if message.round < answers.last - 1:
                raise Damaged(
                    f"the server is in round {message.round}, and this node has answered round "
                    f"{answers.last}. A server that lost its results starts again; to let this node start "
                    f"again with it, move {self.folder.parent} elsewhere. What left before counts, too"
                )
            if isinstance(message, MaskMessage):
                return self._unmask(message, content, answers)
            if isinstance(message, Broadcast):
                update = self._update(message, content, answers)
                return self._begin_masking(message, update) if self.masking else update
            return self._scores(message, content, answers)

    def read(self, content: bytes) -> Broadcast | Evaluation | MaskMessage:
        """Parses a message and checks it against the agreement, before anything is computed or stored.

        Raises:
            Damaged: as `answer` does.
        """
        message, setup = from_bytes(content), self.site.setup
        if not isinstance(message, Broadcast | Evaluation | MaskMessage):
            raise Damaged(f"a server does not send {type(message).__name__}")
        if (message.cell, message.client) != (self.cell, self.client):
            raise Damaged(f"the message is for client {message.client} of {message.cell}")
        if isinstance(message, MaskMessage):
            return message
        if isinstance(message, Broadcast):
            self.terms.check_broadcast(message)
            first = setup.first if setup.codec.down else setup.ranks.cut(self.client, setup.first)
            check_broadcast(message, first, setup.slices, setup.method, setup.codec, setup.algorithm)
        else:
            self.terms.check_evaluation(message)
            check_evaluation(message, setup.first, setup.slices)
        return message

    def _update(self, broadcast: Broadcast, content: bytes, answers: Answers) -> bytes:
        round_ = broadcast.round
        if (repeated := answers.repeat("update", round_, content)) is not None:
            return repeated
        if answers.count("update", round_):
            raise Damaged(f"round {round_} was answered already, and this is another broadcast of it")
        if round_ < answers.last:
            raise Damaged(f"round {answers.last} was answered already, and round {round_} comes before it")
        ((update, _),) = self.site.train([broadcast])
        assert update, "the terms admit no client that drops out"
        return answers.add("update", round_, content, to_bytes(update))

    def _begin_masking(self, broadcast: Broadcast, content: bytes) -> bytes:
        """The public keys for the masks of an update; the update itself stays here."""
        assert self.masking
        planned, model = self.terms.uplinks(broadcast.round), self._hash_received(broadcast)
        return to_bytes(self.masking.begin(from_bytes(content), planned, model))

    def _hash_received(self, broadcast: Broadcast) -> bytes:
        """SHA-256 of the global slices and the auxiliary state that a broadcast leads to."""
        setup = self.site.setup
        sent = {slice_: payload.tensors for slice_, payload in broadcast.payloads.items()}
        aux, state = sent.pop(AUX, {}), dict(setup.first)
        if setup.codec.down:  # deltas to what this client had
            state |= self.site.memory.read(self.client, broadcast.round)["reference"]
        else:
            state |= {name: tensor for tensors in sent.values() for name, tensor in tensors.items()}
        downlink = setup.method.in_round(broadcast.round, setup.slices.names).downlink
        return hash_model(setup.slices.select(downlink, state), aux)

    def _unmask(self, message: MaskMessage, content: bytes, answers: Answers) -> bytes:
        """Answers a step of secure aggregation; the shares that unmask a round are revealed once."""
        if self.masking is None:
            raise Damaged("the agreement has no secure aggregation")
        if message.step != "survivors":
            return to_bytes(self.masking.answer(message))
        if (repeated := answers.repeat("unmask", message.round, content)) is not None:
            return repeated
        if answers.count("unmask", message.round):
            raise Damaged(f"round {message.round} was unmasked already, and these are other survivors")
        return answers.add("unmask", message.round, content, to_bytes(self.masking.answer(message)))

    def _scores(self, request: Evaluation, content: bytes, answers: Answers) -> bytes:
        round_, kind = request.round, "images" if request.draw else "fingerprint"
        if (repeated := answers.repeat(kind, round_, content)) is not None:
            return repeated
        if (count := answers.count(kind, round_)) >= MODELS:
            raise Damaged(f"{kind} of {count} models left after round {round_} already")
        return answers.add(kind, round_, content, to_bytes(self.site.evaluate(request)))


def make_masking(secure: SecureAggregation, client: int, key: Path | None) -> MaskClient:
    """The institution's part in secure aggregation.

    Raises:
        BadInput: the agreement lists nodes' keys, and `key` is not that of the client.
    """
    if secure.signers is None:
        return MaskClient(secure, client)
    if key is None:
        raise BadInput(
            "the agreement has the keys of masks signed by the nodes' keys (transport.nodes): add "
            'key="/path/to/node.key" to --node-config'
        )
    return MaskClient(secure, client, load_signer(key, client, secure.signers))
