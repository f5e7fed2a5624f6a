"""A server of bytes: what it sends, and when, is up to the test."""

import socket
import threading


class RawServer:
  """`play(send, stop)` answers each connection; `stop` is an Event that ends all of them."""

  def __init__(self, play):
    self.stop = threading.Event()
    self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
    self.port = self._listening.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    self._play = play
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self):
    while not self.stop.is_set():
      try:
        connection, _ = self._listening.accept()
      except OSError:
        return
      threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

  def _serve(self, connection):
    with connection:
      try:
        connection.recv(1 << 16)
        self._play(connection.sendall, self.stop)
      except OSError:
        pass

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.stop.set()
    self._listening.close()


def dripping(first, piece):
  """Sends `first`, then `piece` every 50 ms for ever."""

  def play(send, stop):
    send(first)
    while not stop.wait(0.05):
      send(piece)

  return play


DRIPS = {
  "head": dripping(b"HTTP/1.1 200 OK\r\nx: ", b"a"),
  "continue": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
  "chunk sizes": dripping(
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1;" + b"x" * 20 + b"\r\n \r\n"
  ),
  "chunk size": dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"x"),
}
