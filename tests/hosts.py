"""Two machines on one: network namespaces with a host name each, joined by a cable that can be pulled."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence


NETWORK = "10.231.77"


def why_not() -> str:
    """Why this machine cannot play two; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        _do("ip", "netns", "add", "leanmill-try")
        _do("ip", "netns", "del", "leanmill-try")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {error}"
    return ""


class TwoHosts:
    """Hosts `node-0` and `node-1` at 10.231.77.1 and .2; a context, which takes them away at its end."""

    def __init__(self) -> None:
        # Short: a device's name has at most 15 letters.
        self._spaces = [f"leanmill-{os.getpid()}-{node}" for node in range(2)]
        self._devices = [f"lm{os.getpid() % 100_000}-{node}" for node in range(2)]

    def __enter__(self) -> TwoHosts:
        for space in self._spaces:
            _do("ip", "netns", "add", space)
        first, second = self._devices
        _do("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for node, (space, device) in enumerate(zip(self._spaces, self._devices, strict=True)):
            _do("ip", "link", "set", device, "netns", space)
            self._inside(node, "ip", "addr", "add", f"{NETWORK}.{node + 1}/24", "dev", device)
            self._inside(node, "ip", "link", "set", "lo", "up")
            self._inside(node, "ip", "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            # Whatever still runs there would keep it.
            left = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
            for pid in left.stdout.split():
                subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def start(self, node: int, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start `command` on a host, its output in a pipe."""
        set_name = f'hostname node-{node} && exec "$@"'
        inside = ["ip", "netns", "exec", self._spaces[node], "unshare", "-u", "sh", "-c", set_name, "sh", *command]
        return subprocess.Popen(
            inside,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": self._devices[node], **environment},
        )

    def plug(self, *, is_in: bool) -> None:
        """Pull the cable, or put it back."""
        self._inside(0, "ip", "link", "set", self._devices[0], "up" if is_in else "down")

    def _inside(self, node: int, *command: str) -> None:
        _do("ip", "netns", "exec", self._spaces[node], *command)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
