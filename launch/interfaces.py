"""Which addresses do the processes of a job listen on? Only those by which they reach each other.

Processes of one host meet on loopback; those of several on the interface that leads to the first one. Nothing of theirs
asks who calls, so nothing of theirs is to be reached from elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import socket
import struct

from smoe_hpc.errors import LaunchError

_log = logging.getLogger(__name__)
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def listening_socket(host: str, port: int, several_hosts: bool) -> socket.socket:
    """A socket that listens on a host's own address alone.

    Args:
        host: name or address of this host, by which the others reach it.
        port: to listen on.
        several_hosts: whether others are on other hosts: they cannot reach a name that is loopback here.

    Raises:
        LaunchError: the port is in use, or the host has no address.
    """
    address = _resolved(host, port)
    if several_hosts and address.startswith("127."):
        return _everywhere(port, f"{host} is {address} on this host, which the others cannot reach")
    try:
        return _listening(address, port)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # an address that something in between translates
            return _everywhere(port, f"{host} ({address}) is no address of this host's own")
        raise _not_listening(address, port, error) from None


def loopback_interface() -> str | None:
    """Name of the loopback interface, None where this host shows none."""
    return next((name for _, name in socket.if_nameindex() if (_address_of(name) or "").startswith("127.")), None)


def interface_towards(host: str) -> str | None:
    """Name of the interface through which this host reaches another (or itself); None where that is unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it asks for the way
            own = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), None)


def _resolved(host: str, port: int) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR={host} has no address ({error}); set it to the address of rank 0's host") from None
    # IPv4 where there is one: a name may have both, and those who connect try all
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def _listening(address: str, port: int) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(4096)
    except BaseException:
        made.close()
        raise
    return made


def _everywhere(port: int, why: str) -> socket.socket:
    _log.warning("%s: rank 0 listens on all interfaces, port %d; set MASTER_ADDR to the address of one of them", why, port)
    try:
        return _listening("", port)
    except OSError as error:
        raise _not_listening("*", port, error) from None


def _not_listening(address: str, port: int, error: OSError) -> LaunchError:
    return LaunchError(f"rank 0 cannot listen on {address}:{port} ({error.strerror}); set MASTER_PORT to another port")


def _address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None
