"""The other end of a producer's connection: checks every frame as the service does, keeps what came, answers pings."""

import contextlib
import socket
import threading

from lib import wire


class Peer:
    """Listens on a free port of this machine; `got` holds what came, in order; wait for it with `until`."""

    def __init__(self, answers: bool = True):
        self.got, self.hellos, self.answers, self.error = [], [], answers, None
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()
        self._news = threading.Condition()
        self._links: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def until(self, true, timeout_s: float = 300.0):
        """Wait until `true(self)`; what it returned."""
        with self._news:
            assert self._news.wait_for(lambda: true(self) or self.error, timeout_s), f"{len(self.got)} items came"
            assert not self.error, self.error
            return true(self)

    def drop(self) -> None:
        """Cut all connections off."""
        while self._links:
            with contextlib.suppress(OSError):  # gone by itself
                self._links.pop().shutdown(socket.SHUT_RDWR)

    def chunks(self) -> list[wire.Samples]:
        """What came of samples."""
        return [item for item in self.got if isinstance(item, wire.Samples)]

    def events(self) -> list[wire.Event]:
        """What came of events."""
        return [item for item in self.got if isinstance(item, wire.Event)]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown(socket.SHUT_RDWR)  # or accept would go on
        self._thread.join()
        self._server.close()

    def _tell(self, where: list, what) -> None:
        with self._news:
            where.append(what)
            self._news.notify_all()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                return
            self._links.append(link)
            threading.Thread(target=self._receive, args=(link,), daemon=True).start()

    def _receive(self, link: socket.socket) -> None:
        try:
            with link, link.makefile("rb") as file:
                hello = wire.read_handshake(file.readline(wire.MAX_LINE))
                link.sendall(wire.SERVICE_HANDSHAKE)
                self._tell(self.hellos, hello)
                C = len(hello.stream.channels)
                while True:
                    if hello.stream.framing == "ndjson":
                        data = file.readline(wire.MAX_LINE)
                        item = wire.parse_line(data, C) if data else None
                    else:
                        data = file.read(wire.HEADER.size)
                        header = wire.parse_header(data, C) if data else None
                        item = wire.parse_frame(header, file.read(header.payload), C) if data else None
                    if item is None:
                        return
                    if isinstance(item, wire.Ping) and self.answers:
                        link.sendall(wire.line({"type": "pong", "id": item.id, "seq": 0}))
                    self._tell(self.got, item)
                    if isinstance(item, wire.Bye):
                        return
        except OSError:
            return
        except wire.Malformed as error:
            with self._news:
                self.error = error
                self._news.notify_all()
