"""One transport as a reader with back-pressure and a writer that can be waited for.

Both sides of the relay are such connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import select
import socket
import struct
import sys
import termios
from collections import deque
from typing import cast

READ_AHEAD_BYTES = 256 * 1024  # received and not yet taken; above this the peer is made to wait
KNOWN_HEAD_BYTES = 4 * 1024  # longest head that a connection remembers, to recognise it when it comes again
_NEVER_FIRST = frozenset(range(0x20)) - {0x0A, 0x0D}
_TLS_HANDSHAKE = 0x16
_PEER_ENDED: int = getattr(select, "POLLRDHUP", 0)  # of Linux
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class NotHTTP(Exception):
    """The first byte of a message is none that HTTP's begin with."""


class HeadTooLong(Exception):
    """The head of a message is over the limit; ``in_start_line`` says whether its first line alone is.

    ``data`` is how it begins.
    """

    def __init__(self, data: bytes, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.in_start_line = b"\n" not in data[:max_bytes]
        self.data = data


class Connection:
    """A byte stream both ways. Subclasses say what a lost connection means to them.

    An ``asyncio.Protocol`` by its methods and not by its base, which a compiled class could not have.
    """

    __slots__ = (
        "_drained",
        "_ended",
        "_loop",
        "_lost",
        "_pieces",
        "_reading_paused",
        "_received_bytes",
        "_unsent_bytes",
        "_waiter",
        "_writing_paused",
        "broken",
        "half_open",
        "partial_since",
        "peer",
        "stirred",
        "tls",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.transport: asyncio.Transport | None = None
        self._reading_paused = False
        self._writing_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._pieces: deque[bytes] = deque()
        self._received_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._lost: Exception | None = None
        self.broken = False  # lost in another way than by an orderly close
        self.half_open = False  # whether either side may end its own direction only
        self._ended = False  # the peer has done so
        self.peer: Connection | None = None  # the other end of the tunnel that this one has become an end of
        self.partial_since = 0.0  # since when a head has come in part, and is waited for; 0: it is not
        # Set by whatever moves, cleared by the sweep: time-outs cost the traffic path neither a timer nor a clock.
        self.stirred = True
        self.tls = False
        self._unsent_bytes = 0  # when it was looked at last

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.tls = transport.get_extra_info("sslcontext") is not None

    def data_received(self, data: bytes) -> None:
        self.stirred = True
        self._pieces.append(data)
        self._received_bytes += len(data)
        if self._received_bytes > READ_AHEAD_BYTES:
            self._pause_reading()
        self._wake()

    def eof_received(self) -> bool | None:
        # A peer that ends its side is taken for gone, as Go and nginx do: a client that left and one that
        # only shut down its sending side look the same, and the model server should stop working for the first.
        if not self.half_open or self.transport is None or not self.transport.can_write_eof():
            return False
        self._ended = True
        self._wake()
        return True

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost = self._lost or ConnectionResetError(str(exc) if exc else "connection closed")
        self.broken = self.broken or exc is not None
        self.transport = None
        if self.broken and self.peer is not None:  # which may not be read or written to now, and would not be told
            self.peer.abort()
        self._wake()
        self._wake_writer()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self.stirred = True
        self._writing_paused = False
        self._wake_writer()

    # --- reading ---

    @property
    def lost(self) -> bool:
        return self._lost is not None or self.transport is None or self.transport.is_closing()

    @property
    def has_input(self) -> bool:
        return bool(self._pieces)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for this peer to send."""
        return self._waiter is not None

    async def receive(self) -> bytes:
        """The next bytes, or b"" when the peer has closed. Raises what ``fail`` or ``interrupt`` was given."""
        while not self._pieces:
            if self._ended:
                return b""
            if self._lost is not None:
                if isinstance(self._lost, ConnectionResetError):
                    return b""
                raise self._lost
            self._waiter = waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                if self._waiter is waiter:  # a cancelled reader may be outlived by the next one
                    self._waiter = None
        data = self._pieces.popleft()
        self._received_bytes -= len(data)
        if self._reading_paused and self._received_bytes <= READ_AHEAD_BYTES // 2:
            self._reading_paused = False
            if self.transport is not None and not self.transport.is_closing():
                self.transport.resume_reading()
        return data

    def unread(self, data: bytes) -> None:
        """Puts back what was received too much."""
        if data:
            self._pieces.appendleft(data)
            self._received_bytes += len(data)

    async def receive_head(self, max_bytes: int) -> bytes | None:
        """The bytes up to and with the next empty line; None when the peer closed before. Raises HeadTooLong or NotHTTP."""
        data = await self.receive()
        searched = 0
        while data:
            end = data.find(b"\r\n\r\n", searched)
            if end >= 0:
                end += 4
                if end > max_bytes:
                    raise HeadTooLong(data, max_bytes)
                self.partial_since = 0.0
                if end < len(data):
                    self.unread(data[end:])
                    return data[:end]
                return data
            if len(data) > max_bytes:
                raise HeadTooLong(data, max_bytes)
            if data[0] in _NEVER_FIRST:
                raise NotHTTP("TLS is not spoken here" if data[0] == _TLS_HANDSHAKE else "this is not HTTP")
            searched = max(0, len(data) - 3)
            self.partial_since = self.partial_since or self._loop.time()
            more = await self.receive()
            if not more:
                break
            data += more
        return None

    def interrupt(self, reason: Exception) -> None:
        """Has whoever waits for this peer to send get ``reason`` instead. The connection stays."""
        self.partial_since = 0.0
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_exception(reason)

    def fail(self, reason: Exception) -> None:
        """Aborts the connection; whoever reads from it gets ``reason``."""
        self._lost = self._lost or reason
        self._pieces.clear()
        self.break_off()
        self._wake()

    # --- writing ---

    def write(self, data: bytes) -> None:
        """Sends ``data``, or drops it when the connection is gone: readers are told of that, writers need not be."""
        self.stirred = True
        if self.transport is not None:
            self.transport.write(data)

    async def drain(self) -> None:
        """Waits while the peer takes no more. Returns when it is gone, too."""
        while self._writing_paused and self.transport is not None:
            self._drained = self._loop.create_future()
            try:
                await self._drained
            finally:
                self._drained = None

    def has_left(self) -> bool:
        """Whether the peer has gone while nothing is read from it, so that nothing tells of it. A system call.

        In a tunnel an orderly end does not count: what came before it is still to be passed on.
        """
        descriptor = self.descriptor() if self._reading_paused else -1
        if descriptor < 0:
            return False
        poll = select.poll()
        poll.register(descriptor, 0 if self.half_open else _PEER_ENDED)
        found = poll.poll(0)  # errors and ends of both directions are told of in any case
        return bool(found) and (self.peer is None or bool(found[0][1] & select.POLLERR))

    def descriptor(self) -> int:
        """The socket's, below 0 if there is none any more."""
        sock: socket.socket | None = None if self.transport is None else self.transport.get_extra_info("socket")
        return -1 if sock is None else sock.fileno()

    def unsent_bytes(self) -> int:
        """What was written and not sent. Where there is any the kernel's part counts too, which the peer has not taken yet.

        Over TLS it always does: what lies between the transport and the kernel is not told.
        """
        unsent = 0 if self.transport is None else self.transport.get_write_buffer_size()
        return unsent + self._queued_bytes() if unsent or self.tls else 0

    def has_moved(self) -> bool:
        """Whether anything has, either way, since this was asked before."""
        if not self.stirred and not self._unsent_bytes:
            return False
        unsent = self.unsent_bytes()
        moved = self.stirred or unsent < self._unsent_bytes
        self.stirred = False
        self._unsent_bytes = unsent
        return moved

    def _queued_bytes(self) -> int:
        """What the kernel has, and the peer has not taken; 0 where the system does not tell."""
        descriptor = self.descriptor()
        if descriptor < 0:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    # --- closing ---

    def write_eof(self) -> None:
        """Ends this direction once what was written is sent; the whole connection where it can't be ended by halves."""
        if self.transport is None:
            return
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the peer has closed already
                self.transport.write_eof()
        else:
            self.close()

    def close(self) -> None:
        """Closes once what was written is sent; over TLS, once the peer has said goodbye, too."""
        if self.transport is not None and not self.transport.is_closing():  # asyncio's TLS breaks if it is closed twice
            self.transport.close()

    def let_go(self) -> None:
        """Closes without waiting for a goodbye. What is unsent is lost, but for what the kernel has."""
        self.close()
        if self.tls and self.transport is not None:
            self.transport.abort()

    def break_off(self) -> None:
        """Aborts in the midst of an exchange or a tunnel, so that the other end of this one is reset, too."""
        self.broken = True
        self.abort()

    def abort(self) -> None:
        """Resets the connection, so that the peer can't take what it got for a whole message."""
        if self.transport is None:
            return
        sock: socket.socket | None = self.transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # it is closed already
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()

    def _pause_reading(self) -> None:
        if not self._reading_paused and self.transport is not None:
            self._reading_paused = True
            self.transport.pause_reading()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake_writer(self) -> None:
        drained = self._drained
        if drained is not None and not drained.done():
            drained.set_result(None)
