"""
Who may connect and how: addresses, the token, TLS, and socket options. A bind that others can reach needs both token and TLS.
"""

import contextlib
import hmac
import ipaddress
import os
import socket
import ssl
from pathlib import Path

from lib.errors import Unusable
from lib.wire import printable

TOKEN_VARIABLE = "BERGER_TOKEN"
LEAST_TOKEN = 16  # characters
SEND_BUFFER = 16 * 1024  # bytes the kernel may hide of a consumer that doesn't read


def address(text: str, flag: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address in brackets. Raises Unusable naming the flag."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise Unusable(f"{flag} {printable(text)} must be HOST:PORT, such as 127.0.0.1:7373; port 0 means any")
    return host, int(port)


def shown(name: tuple) -> str:
    """HOST:PORT of a socket's name."""
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a bind to `host`; a name counts as loopback only if it is localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None) -> str | None:
    """The token from a file, else from the environment: never from the command line, which others can read. Raises Unusable."""
    if file is None:
        token = os.environ.get(TOKEN_VARIABLE)
    else:
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unusable(f"--token-file {file} can't be read: {error}") from None
        if not token:
            raise Unusable(f"--token-file {file} is empty")
    return token or None


def same_token(ours: str | None, theirs: str | None) -> bool:
    """Whether a peer knows the token, compared in a time that tells nothing about it; without one of ours anybody does."""
    return ours is None or hmac.compare_digest(ours.encode(), (theirs or "").encode("utf-8", "surrogatepass"))


def check_exposure(host: str, token: str | None, tls: ssl.SSLContext | None) -> None:
    """Refuse to serve other machines without token and TLS. Raises Unusable naming what is missing."""
    if is_loopback(host):
        return
    missing = [] if token else [f"a token (--token-file, or {TOKEN_VARIABLE})"]
    missing += [] if tls else ["TLS (--tls-cert and --tls-key)"]
    if missing:
        raise Unusable(
            f"--listen {host} can be reached by others: it needs {' and '.join(missing)}, or listen on 127.0.0.1"
        )
    if len(token) < LEAST_TOKEN:
        raise Unusable(f"the token has {len(token)} characters: --listen {host} needs at least {LEAST_TOKEN}")


def server_tls(cert: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """TLS 1.2 or newer with a certificate, or None of none. Raises Unusable."""
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise Unusable("--tls-cert and --tls-key belong together: give both, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as error:
        raise Unusable(
            f"--tls-cert {cert} with --tls-key {key}: {error.strerror or error}; they must be PEM files"
        ) from None
    return context


def client_tls(authority: Path | None) -> ssl.SSLContext | None:
    """TLS for dialling out to a server whose certificate `authority` (PEM) vouches for, or None of none. Raises Unusable."""
    if authority is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(authority))
    except (OSError, ssl.SSLError) as error:
        raise Unusable(f"--tls-ca {authority}: {error.strerror or error}; it must be a PEM file") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def listening(host: str, port: int, flag: str, stall_s: float = 10.0) -> socket.socket:
    """A bound socket, whose connections inherit its options. Raises Unusable."""
    try:
        family, kind, proto, _, name = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        link = socket.socket(family, kind, proto)
    except OSError as error:
        raise Unusable(f"{flag} {host}:{port}: {error.strerror or error}") from None
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tune(link, stall_s)
    try:
        link.bind(name)
    except OSError as error:
        link.close()
        raise Unusable(f"{flag} {host}:{port}: {error.strerror or error}; choose another port, 0 means any") from None
    return link


def tune(link: socket.socket, stall_s: float) -> None:
    """No delay, little hidden in the kernel; who vanished is noticed within 30 s, and who takes nothing after `stall_s`."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": round(1000 * stall_s)}
    for name, value in options.items():
        if hasattr(socket, name):  # not everywhere
            with contextlib.suppress(OSError):
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
