"""Sending a file: conditional requests, ranges and digests (RFC 9110, RFC 9530)."""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime
from io import BufferedReader
from typing import TYPE_CHECKING

from werkzeug.exceptions import PreconditionFailed
from werkzeug.http import dump_options_header, is_resource_modified, parse_dict_header
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import wrap_file

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_CHUNK = 1 << 18  # bytes read at once
_MAX_DIGESTS = 1000

_digests: OrderedDict[tuple[int, ...], bytes] = OrderedDict()  # by device, inode, size and time of files


def send_file(request: Request, file: BufferedReader, name: str) -> Response:
    """Return the response with a file; it honours conditions, Range and Want-Repr-Digest, and closes the file.

    Werkzeug's own send_file (3.1) answers 416 to two ranges and to the last 500 bytes of a shorter file, 412 to `If-Match: *`, 206 in
    place of 304, and does not know If-Unmodified-Since.
    """
    status = os.fstat(file.fileno())
    response = Response(mimetype="application/octet-stream", direct_passthrough=True)
    response.headers["Content-Disposition"] = dump_options_header("attachment", {"filename": name})
    response.content_length = status.st_size
    response.last_modified = datetime.fromtimestamp(int(status.st_mtime), UTC)
    response.set_etag(f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")
    if parse_dict_header(request.headers.get("Want-Repr-Digest", "")).get("sha-256", "0") != "0":
        response.headers["Repr-Digest"] = f"sha-256=:{b64encode(_sha256_of(file, status)).decode()}:"
    # Conditions come before ranges; anything but a single range of bytes may be ignored (RFC 9110, 13.2.2 and 14.2).
    environ = _without_if_match_any(request)
    modified = is_resource_modified(environ, response.headers["ETag"], last_modified=response.last_modified)
    ranges = request.range if request.method == "GET" and modified else None
    single = ranges is not None and ranges.units == "bytes" and len(ranges.ranges) == 1
    if request.headers.get("If-Range") not in (None, response.headers["ETag"]):
        single = False  # a date does not tell files of one second apart (RFC 9110, 13.1.5)
    if ranges is not None and single and -(ranges.ranges[0][0] or 0) > status.st_size:
        single = False  # more bytes from the end than the file has
    response.make_conditional(environ, accept_ranges=single, complete_length=status.st_size)
    since = request.if_unmodified_since
    late = not request.if_match and since is not None and response.last_modified > since
    if response.status_code == 412 or late:
        raise PreconditionFailed("The file is not the one that the condition names")
    response.headers["Accept-Ranges"] = "bytes"
    _set_body(request, response, file, status.st_size)
    return response


def _set_body(request: Request, response: Response, file: BufferedReader, size: int) -> None:
    start, length = response.content_range.start or 0, response.content_length or 0
    if request.method == "HEAD" or response.status_code not in (200, 206):
        file.close()
        response.response = []
    elif length == size or request.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        # The server may let the kernel copy the file. For a range only gunicorn can: uWSGI copies from the file's start.
        file.seek(start)
        response.response = wrap_file(request.environ, file, _CHUNK)
    else:
        response.response = _read_range(file, start, length)


def conditional(request: Request, response: Response) -> Response:
    """Return an answer with its ETag, or 304 if the client has it; raises PreconditionFailed."""
    response.add_etag()  # of the content, if it has none yet
    response.make_conditional(_without_if_match_any(request))
    if response.status_code == 412:
        raise PreconditionFailed("The answer is not the one that the condition names")
    return response


def _without_if_match_any(request: Request) -> WSGIEnvironment:
    """Drop `If-Match: *`: any existing file matches, and Werkzeug does not support it."""
    if not request.if_match.star_tag:
        return request.environ
    return {name: value for name, value in request.environ.items() if name != "HTTP_IF_MATCH"}


def _read_range(file: BufferedReader, start: int, length: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while length and (piece := file.read(min(length, _CHUNK))):
            yield piece
            length -= len(piece)


def _sha256_of(file: BufferedReader, status: os.stat_result) -> bytes:
    """Return the digest of a whole file. It is cached, because a client may ask for it with each of many ranges."""
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    digest = _digests.get(key)
    if digest is None:
        digest = _digests[key] = hashlib.file_digest(file, "sha256").digest()
        while len(_digests) > _MAX_DIGESTS:
            _digests.popitem(last=False)
    return digest
