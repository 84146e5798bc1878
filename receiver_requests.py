"""Requests: their headers, body and form, and the exceptions that refuse a request."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from werkzeug.datastructures import Headers, MultiDict
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData, State
from werkzeug.utils import cached_property
from werkzeug.wrappers import Request
from werkzeug.wsgi import get_input_stream

import storage
from receiver_settings import AGENT, Token
from uploads import Upload

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

logger = logging.getLogger("dqm_receiver")

BODY_CHUNK = 1 << 17  # bytes of a body that are read at once
FORM_OVERHEAD = 1 << 20  # bytes that a form may have beside its file
REQUIRED_HEADERS = ("runNumber", "timeStamp", "amoreAgent")
NO_FILE = "No file uploaded and the payload was empty"

_FORM_TAIL = 512  # bytes at the end of a form that are read as a piece of their own
_MAX_FORM_BUFFER = 2 << 20  # bytes of a preamble, of the head of a part, or of an epilogue
_MAX_FORM_PARTS = 16
_MAX_PADDING = 100  # blanks after a boundary (RFC 2046, 5.1.1, "transport-padding")
_QUOTES = "a boundary with = or / must stand in quotes"
_MAX_LIMIT = 1000  # entries on one page of a list
_MIN_RATE = 1024  # bytes a second; a slower refused body is not read on


class RequestRefused(Exception):
    """A request is answered with an error; `reason_class` labels metrics, `reason` adds details to a known message."""

    def __init__(
        self,
        message: str,
        reason_class: str,
        *,
        reason: str | None = None,
        status: int = 400,
        headers: Iterable[tuple[str, str]] = (),
    ) -> None:
        super().__init__(message)
        self.reason_class, self.reason, self.status, self.headers = reason_class, reason, status, headers


class FileRejected(RequestRefused):
    """A file arrived whole and is refused: its SHA-256 is not the announced one, or it is not a valid ROOT file."""

    def __init__(
        self,
        message: str,
        reason_class: str,
        upload: Upload,
        reason: str | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(message, reason_class, reason=reason)
        self.facts = {"size": upload.size, "sha256": upload.sha256, "validation_seconds": seconds}


class ClientGone(RequestRefused):
    """The client has closed its connection, so it cannot read an answer."""

    def __init__(self) -> None:
        super().__init__("The client closed the connection before its file was validated", "client_gone")


# --- requests ----------------------------------------------------------------------------------------------------------


class ReceiverRequest(Request):
    """A request, with the facts about its sender and upload that logs and metrics need when it is refused."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ, populate_request=False)  # no cycle: the request is freed as soon as it is answered
        self.began = time.monotonic()
        self.body = Body(environ, self.content_length or 0)
        self.token: Token | None = None
        self.is_check = False
        self.is_logged = False

    @property
    def facts(self) -> dict[str, object]:
        """The sender and the upload, for the log; the headers are not checked, because a refusal may be about them."""
        raw = {name: self.headers.get(header) for name, header in (("run", "runNumber"), ("agent", "amoreAgent"))}
        known = {name: value[:100] for name, value in raw.items() if value is not None}
        return {"address": self.remote_addr, "sender": self.token.name if self.token else None, **known}

    @property
    def page(self) -> tuple[int | None, str | None]:
        """The query parameters `limit` and `before`, which ask for a page of a list."""
        limit, before = self.parameter("limit"), self.parameter("before")
        if before is not None and limit is None and "receipts" not in self.path:
            raise RequestRefused("The query parameter before needs limit", "query")
        return (None if limit is None else check_number("query limit", limit, _MAX_LIMIT, 1)), before

    @cached_property
    def args(self) -> MultiDict[str, str]:
        try:
            return super().args
        except UnicodeDecodeError as error:
            raise RequestRefused("The query is not UTF-8", "query") from error

    @property
    def is_form(self) -> bool:
        return self.mimetype == "multipart/form-data"

    def parameter(self, name: str) -> str | None:
        """Return a parameter of the query, or None; raises RequestRefused if it came twice."""
        values = self.args.getlist(name)
        if len(values) > 1:
            raise RequestRefused(f"The query has more than one {name}", "query")
        return values[0] if values else None


class Body:
    """A request body, counted while it is read. An error while it is read is answered 400."""

    def __init__(self, environ: WSGIEnvironment, length: int) -> None:
        self._stream = get_input_stream(environ)
        self._length = length
        self.received = 0  # bytes so far

    def read(self, size: int) -> bytes:
        try:
            piece = self._stream.read(size)
        except Exception as error:
            # Each server has exceptions of its own for a connection that ends or stalls, and for malformed chunks.
            slow = f": {error}" if isinstance(error, TimeoutError) else ""
            message = f"The body ended before it was complete, or was malformed{slow}"
            raise RequestRefused(message, "truncated") from error
        self.received += len(piece)
        if not piece and self.received < self._length:  # gunicorn has no error for this
            raise RequestRefused(f"The body ended after {self.received} of {self._length} bytes", "truncated")
        return piece

    def discard(self, limit: int, seconds: float) -> None:
        """Read on for a bounded time, because many clients read the answer only after they have sent everything."""
        began = time.monotonic()
        try:
            while limit > 0 and (piece := self._stream.read(min(limit, 1 << 16))):
                limit -= len(piece)
                seconds += len(piece) / _MIN_RATE
                if time.monotonic() - began > seconds:
                    break
        except Exception:
            logger.debug("the rest of a refused body could not be read", exc_info=True)


class UploadHeaders(NamedTuple):
    """The headers of an upload, checked."""

    run: int
    time_stamp: int  # Unix seconds
    agent: str
    data_status: int
    sha256: str | None
    file_name: str  # empty if run, time stamp or agent is missing

    @classmethod
    def read(cls, headers: Headers, *, required: bool) -> UploadHeaders:
        """Check the headers; raises RequestRefused, naming the one that is missing or wrong."""
        run, time_stamp, agent = (_header(headers, name) for name in REQUIRED_HEADERS)
        if required and None in (run, time_stamp, agent):
            missing = next(name for name in REQUIRED_HEADERS if name not in headers)
            raise RequestRefused(f"Must pass the header {missing}!", "headers")
        sha256 = _header(headers, "sha256")
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise _wrong_header("header sha256", sha256, "must be 64 hexadecimal digits")
        status = _header(headers, "dataStatus")
        if status not in (None, "0", "1", "2"):
            raise _wrong_header("header dataStatus", status, "must be 0, 1 (start of a set of data) or 2 (end)")
        checked_run = 0 if run is None else check_number("header runNumber", run, storage.MAX_RUN)
        checked_time = 0 if time_stamp is None else check_time_stamp(time_stamp)
        checked_agent = "" if agent is None else check_agent("header amoreAgent", agent)
        is_named = None not in (run, time_stamp, agent)
        name = storage.file_name(checked_agent, checked_run, checked_time) if is_named else ""
        return cls(checked_run, checked_time, checked_agent, int(status or 0), sha256 and sha256.lower(), name)


def _header(headers: Headers, name: str) -> str | None:
    value = headers.get(name)
    # uWSGI leaves tabs around a value, though they are not part of it (RFC 9110, 5.5).
    return None if value is None else value.strip("\t")


def _wrong_header(where: str, text: str, rule: str, reason_class: str = "headers") -> RequestRefused:
    # WSGI servers join the values of a header that came twice with a comma (PEP 3333 leaves it to CGI, RFC 3875).
    twice = "; it came twice" if "," in text else ""
    return RequestRefused(f"The {where} {rule}{twice}", "query" if where.startswith("query") else reason_class)


def check_number(where: str, text: str, largest: int, smallest: int = 0) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or not smallest <= int(text) <= largest:
        raise _wrong_header(where, text, f"must be a number from {smallest} to {largest}, in ASCII digits")
    return int(text)


def check_time_stamp(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) > storage.LAST_TIME_STAMP:
        hint = ""
        if re.fullmatch(r"[0-9]{12,20}", text):
            hint = "; divide milliseconds by 1000"
        elif re.match(r"[0-9]{4}-[0-9]{2}", text):
            hint = ", not a date"
        elif re.fullmatch(r"[0-9]+\.[0-9]*", text):
            hint = ", without a fraction"
        rule = f"must be Unix seconds, a number from 0 to {storage.LAST_TIME_STAMP}, in ASCII digits{hint}"
        raise _wrong_header("header timeStamp", text, rule)
    return int(text)


def check_agent(where: str, text: str) -> str:
    if not AGENT.fullmatch(text):
        rule = "must be 1 to 64 of the characters A-Z, a-z, 0-9, - and _, and begin with a letter or digit"
        raise _wrong_header(where, text, rule)
    return text


# --- forms ---------------------------------------------------------------------------------------------------------------


def receive_form(request: ReceiverRequest, upload: Upload) -> None:
    """Write the part `file` of a multipart form to an upload."""
    is_file, files, other, piece = False, 0, 0, b""
    for event in form_events(request):
        if isinstance(event, Field | File):
            is_file = event.name == "file"
            files += is_file
            if is_file and isinstance(event, Field):
                hint = "write `-F file=@x` in curl, curl_mime_filename in libcurl"
                raise malformed(f"the part `file` has no file name, so it is a field and not a file: {hint}")
            if files > 1:
                raise malformed("it has more than one part named `file`")
        elif isinstance(event, Data) and is_file:
            piece += event.data
            if len(piece) > BODY_CHUNK // 2 or not event.more_data:  # a small file is written in one call
                upload.write(piece)
                piece = b""
        elif isinstance(event, Data):
            other += len(event.data)
            if other > FORM_OVERHEAD:
                raise malformed(f"it has more than {FORM_OVERHEAD} bytes beside the part `file`")
    if not files:
        raise RequestRefused(NO_FILE, "empty", reason="the form has no part named `file`")


def form_events(request: ReceiverRequest) -> Iterator[Event]:
    """Yield the events of Werkzeug's parser for the body of a form; raises RequestRefused if the form is malformed."""
    boundary = request.mimetype_params.get("boundary", "")
    if not boundary or not boundary.isascii():
        raise malformed(f"its Content-Type has no boundary, or one that is not ASCII; {_QUOTES}")
    delimiter = b"--" + boundary.encode()
    decoder = MultipartDecoder(boundary.encode(), max_form_memory_size=_MAX_FORM_BUFFER, max_parts=_MAX_FORM_PARTS)
    try:
        while not isinstance(event := decoder.next_event(), Epilogue):
            if isinstance(event, NeedData):
                # Werkzeug (3.1.9) searches a piece that holds a boundary by a slow expression, so the closing one gets a small piece.
                left = (request.content_length or 0) - request.body.received
                size = min(BODY_CHUNK, left - _FORM_TAIL) if left > _FORM_TAIL else BODY_CHUNK
                decoder.receive_data(request.body.read(size) or None)
                # If a chunk ends inside a delimiter line, Werkzeug (3.1.9) adds the CR before that line to the file.
                while ends_in_delimiter(decoder.buffer, delimiter) and not decoder.complete:
                    decoder.receive_data(request.body.read(len(delimiter)) or None)
            else:
                yield event
    except UnicodeDecodeError as error:
        raise malformed("the head of a part (its file name?) is not UTF-8") from error
    except RequestEntityTooLarge as error:
        raise malformed(
            f"it has more than {_MAX_FORM_PARTS} parts, or a very long head, preamble or epilogue"
        ) from error
    except (ValueError, HTTPException) as error:
        if not request.body.received:
            raise RequestRefused(NO_FILE, "empty", reason="the form is empty") from error
        if decoder.state is State.PREAMBLE:
            raise malformed(f"the boundary of its Content-Type, {boundary!r}, is not in the body; {_QUOTES}") from error
        if decoder.state is State.PART:
            raise malformed("the head of a part is incomplete, or has no Content-Disposition") from error
        raise malformed("it ends without the closing boundary") from error


def ends_in_delimiter(buffer: bytearray, delimiter: bytes) -> bool:
    """Return whether a buffer ends inside a delimiter line."""
    tail = bytes(buffer[-len(delimiter) - _MAX_PADDING :]).rstrip(b" \t\v\f")
    return tail.endswith((delimiter, delimiter + b"-"))


def malformed(problem: str) -> RequestRefused:
    return RequestRefused(f"The form is malformed: {problem}", "malformed_form")
