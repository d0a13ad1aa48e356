"""Where the processes of one machine listen for one another."""

import os
import socket
import subprocess
import sys

import pytest

from tests import ROOT, needs_linux
from tests.reliability.support.stage_processes import free_port
from tests.sampling import sampled

PROGRAM = """
import psutil
from calm_core.runtime.process_group import joined
with joined("cpu") as group:
    addresses = {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == "LISTEN"}
    assert group.any_rank([group.rank == 1]) == [True]
    print(*addresses)
"""


def address_of_this_machine() -> str | None:
    """The one that packets to others would come from; none are sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@needs_linux
@pytest.mark.parametrize(("here", "elsewhere"), sampled([(2, False), (1, True)], (2, False)))
def test_one_machine_needs_no_name(here: int, elsewhere: bool) -> None:
    """The machine is called by its address in the network, which is where gloo listens by itself."""
    address = address_of_this_machine()
    renamed = ["unshare", "--user", "--map-root-user", "--uts", "sh", "-c", f'hostname {address} && exec "$@"', "sh"]
    if address is None or subprocess.run([*renamed, "true"], capture_output=True).returncode:
        pytest.skip("this machine has no network, or no namespaces to give it another name in")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    shared |= {"LOCAL_WORLD_SIZE": str(here), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"} | shared
    processes = [
        subprocess.Popen(
            [*renamed, sys.executable, "-c", PROGRAM],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    # The first process also holds torch's store, which listens on every address.
    assert set(told[1]) == {address if elsewhere else "127.0.0.1"}
    assert (address in told[0]) is elsewhere
