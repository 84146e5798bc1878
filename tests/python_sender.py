"""Upload a file as a library of Python does, and print the status: python_sender.py urllib|requests URL FILE HEADER…"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request


def by_urllib(url: str, path: str, headers: dict[str, str]) -> int:
    with open(path, "rb") as file:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, file, headers)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def by_requests(url: str, path: str, headers: dict[str, str]) -> int:
    import requests

    with open(path, "rb") as file:
        return requests.post(url, data=file, headers=headers).status_code


if __name__ == "__main__":
    library, url, path, *fields = sys.argv[1:]
    send = {"urllib": by_urllib, "requests": by_requests}[library]
    print(send(url, path, dict(field.split(": ", 1) for field in fields)))
