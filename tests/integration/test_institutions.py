"""The server needs nothing of a client but its messages: not even the right to read its folder."""

import os
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from toy import PARTIAL, federate, inline, toy_server, toy_setup, toy_site

from fedlight.federation.messages import from_bytes, to_bytes

SERVER, CLIENT = 64_998, 64_999  # system users that own nothing else


class Institution:
    """Clients in a process of another system user, which answers bytes by bytes."""

    def __init__(self, folder: Path) -> None:
        self.pipe, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setgid(CLIENT)
            os.setuid(CLIENT)
            os.umask(0o077)
            site = toy_site(toy_setup(PARTIAL), folder / "memory")
            while content := theirs.recv_bytes():
                (receipt,) = site.update([from_bytes(content)])
                theirs.send_bytes(receipt.read() if receipt else b"-")
            os._exit(0)

    def exchange(self, broadcasts: Any) -> Iterator[Any]:
        for broadcast in broadcasts:
            self.pipe.send_bytes(to_bytes(broadcast))
            yield from_bytes(self.pipe.recv_bytes())

    def evaluate(self, requests: Any) -> Iterator[Any]:
        raise AssertionError("nobody asks")

    def end(self) -> None:
        self.pipe.send_bytes(b"")
        os.waitpid(self.pid, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_client_of_another_system_user_federates_all_the_same(tmp_path: Path) -> None:
    setup = toy_setup(PARTIAL)
    plain = toy_server(setup)
    for _ in federate(plain, inline(toy_site(setup, tmp_path / "plain")), 3):  # loads all libraries, too
        pass

    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, CLIENT, CLIENT)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o011)  # the way there is free, but not the folder
    institution = Institution(home)
    server = toy_server(setup)
    try:
        os.seteuid(SERVER)
        for _ in federate(server, institution, 3):
            with pytest.raises(PermissionError):
                list(home.iterdir())
    finally:
        os.seteuid(0)
        institution.end()
    assert all(server.theta[name].equal(tensor) for name, tensor in plain.theta.items())
    memories = sorted(path.relative_to(home).as_posix().split("-")[0] for path in home.rglob("*.safetensors"))
    assert memories[-1] == "memory/clients/000001/r0003"
    assert all(path.stat().st_uid == CLIENT for path in home.rglob("*"))
