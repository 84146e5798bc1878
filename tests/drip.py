"""Upload a file whose last bytes come one a second, and print seconds and status line: drip.py PORT FILE SECONDS HEAD"""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path


def main(port: str, path: str, seconds: str, head: str) -> None:
    body, slow, began = Path(path).read_bytes(), int(seconds), time.monotonic()
    with socket.create_connection(("127.0.0.1", int(port))) as peer:
        peer.sendall(head.encode() + body[:-slow])
        for at in range(len(body) - slow, len(body)):
            time.sleep(1)
            peer.sendall(body[at : at + 1])
        answer = b""
        while piece := peer.recv(65536):
            answer += piece
    print(time.monotonic() - began, answer.decode().splitlines()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
