"""The port of a server, and its log. No heavy library is imported."""

from __future__ import annotations

import logging
import socket
import sys

from compose.errors import UserError

LOG = logging.getLogger("gateskip.serve")


def bound_socket(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A socket bound to an address, which does not listen yet; `shared` with other processes.

    Raises UserError where the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
    except OSError as error:
        fix = "choose another --port (0 takes a free one) or --host"
        raise UserError(f"{host}, port {port}: {error.strerror or error}", fix=fix) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_lines(who: str) -> None:
    """Write one line a request to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
