"""The DQM receiver: agents push ROOT files over HTTP, it validates and stores them and gives them back.

`create_app(environ)` returns the WSGI application. It can be mounted in another one, run under gunicorn or called in tests.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import is_resource_modified, parse_dict_header
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import get_input_stream, wrap_file

import rootcheck
import storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("dqm_receiver")

_PREFIX = "DQM_RECEIVER_"
_CHUNK = 1 << 18  # bytes read at once
_FORM_OVERHEAD = 1 << 20  # bytes a form may have beside its file
_MAX_FORM_PARTS = 16
_MIN_DISCARD = 64 << 20  # bytes of a refused body that are read in any case, so that its sender sees the answer

SUCCESS = "Successfully received file and extracted information"
NO_TOKEN = "Must pass a token!"
WRONG_TOKEN = "Received token, but it is invalid!"
NOT_VALID = "Successfully received the file, but the file is not valid! Perhaps it was corrupted?"
NO_FILE = "No file uploaded and the payload was empty"


# --- settings ----------------------------------------------------------------------------------------------------------


class ConfigurationError(Exception):
    """A setting is missing or wrong; the text names it."""


@dataclass(frozen=True)
class Settings:
    """What the environment variables `DQM_RECEIVER_…` say; sizes in bytes."""

    data_folder: Path
    token: str
    max_file_size: int
    min_free_space: int
    max_rejected: int

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings; raises ConfigurationError."""
        token = environ.get(f"{_PREFIX}TOKEN", "")
        if not token:
            raise ConfigurationError(f"{_PREFIX}TOKEN is not set: the receiver needs the token that senders pass")
        return cls(
            data_folder=Path(environ.get(f"{_PREFIX}DATA_FOLDER") or "data"),
            token=token,
            max_file_size=_read_size(environ, "MAX_FILE_SIZE", 2 << 30),
            min_free_space=_read_size(environ, "MIN_FREE_SPACE", 1 << 30),
            max_rejected=_read_size(environ, "MAX_REJECTED", 256 << 20),
        )


def _read_size(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(_PREFIX + name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigurationError(f"{_PREFIX}{name} must be a number of bytes, not {text!r}")
    return int(text)


# --- refusals ----------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that is the sender's to mend, and what the answer says beside the message."""

    def __init__(self, message: str, **details: str) -> None:
        super().__init__(message)
        self.details = details


# --- requests ----------------------------------------------------------------------------------------------------------


class AgentRequest(Request):
    """A request, with its body and the name of the token that it carries."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ)
        self.body = Body(environ)
        self.sender = ""


class Body:
    """A request's body: what goes wrong while it is read is the sender's doing and no fault of ours."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._stream = get_input_stream(environ)

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except Exception as error:  # each server has its own for a connection that ends or stalls, or a malformed chunk
            raise Refusal("The body ended before it was complete, or was malformed") from error

    def discard(self, limit: int) -> None:
        """Read on, so that the sender, who may look for an answer only then, gets it and no broken connection."""
        try:
            while limit > 0 and (piece := self._stream.read(_CHUNK)):
                limit -= len(piece)
        except Exception:
            logger.debug("the rest of a refused body could not be read", exc_info=True)


class UploadHeaders(NamedTuple):
    """What the headers of an upload say, checked."""

    run: int
    time_stamp: int  # Unix seconds
    agent: str
    data_status: int
    sha256: str | None

    @classmethod
    def read(cls, headers: Headers) -> UploadHeaders:
        """Check the headers; raises Refusal, naming the one that is missing or wrong."""
        sha256 = headers.get("sha256")
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise Refusal("The header sha256 must be 64 hexadecimal digits")
        return cls(
            run=check_number("header runNumber", headers.get("runNumber"), storage.MAX_RUN),
            time_stamp=check_number("header timeStamp", headers.get("timeStamp"), storage.LAST_TIME_STAMP),
            agent=check_agent("header amoreAgent", headers.get("amoreAgent")),
            data_status=check_number("header dataStatus", headers.get("dataStatus", "0"), 2),
            sha256=sha256 and sha256.lower(),
        )


def check_number(what: str, text: str | None, largest: int) -> int:
    if text is None:
        raise Refusal(f"Must pass the {what}!")
    if not re.fullmatch(r"[0-9]{1,20}", text) or int(text) > largest:
        raise Refusal(f"The {what} must be a number from 0 to {largest}, in ASCII digits")
    return int(text)


def check_agent(what: str, text: str | None) -> str:
    if text is None:
        raise Refusal(f"Must pass the {what}!")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", text):
        raise Refusal(f"The {what} must be 1 to 64 of the characters A-Z, a-z, 0-9, - and _")
    return text


# --- the application ---------------------------------------------------------------------------------------------------


class Receiver:
    """The WSGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.storage = storage.Storage(
            settings.data_folder,
            max_file_size=settings.max_file_size,
            min_free_space=settings.min_free_space,
            max_rejected=settings.max_rejected,
        )
        self.tokens = {"default": [hashlib.sha256(settings.token.encode()).digest()]}
        self.validating = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))
        self.routes = Map(
            [
                Rule("/rest/api/files", methods=["POST"], endpoint=self.receive),
                Rule("/rest/api/files", methods=["GET"], endpoint=self.list_or_send),
                Rule("/rest/api/files/<name>", methods=["GET"], endpoint=self.send),
                Rule("/", endpoint=self.not_implemented),
            ],
            strict_slashes=False,
            merge_slashes=False,
        )

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.wsgi_app(environ, start_response)

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = AgentRequest(environ)
        try:
            response = self.dispatch(request)
        except Exception as error:  # noqa: BLE001  one place turns whatever happens into an answer
            response = refuse(request, error)
            request.body.discard(max(self.settings.max_file_size, _MIN_DISCARD))
        return response(environ, start_response)

    def dispatch(self, request: AgentRequest) -> Response:
        request.sender = self.check_token(request)
        handler, arguments = self.routes.bind("").match(request.path, request.method)
        response: Response = handler(request, **arguments)
        return response

    def check_token(self, request: AgentRequest) -> str:
        """Return the name of the token that the request carries; every known one is compared, in constant time."""
        token = request.headers.get("token")
        if not token:
            raise Refusal(NO_TOKEN)
        digest = hashlib.sha256(token.encode("latin-1")).digest()  # WSGI hands on a header's bytes as latin-1
        names = [
            name for name, digests in self.tokens.items() for known in digests if hmac.compare_digest(known, digest)
        ]
        if not names:
            raise Refusal(WRONG_TOKEN)
        return names[0]

    # --- receiving a file ----------------------------------------------------------------------------------------------

    def receive(self, request: AgentRequest) -> Response:
        """POST /rest/api/files: validate and store a file."""
        headers = UploadHeaders.read(request.headers)
        name = storage.file_name(headers.agent, headers.run, headers.time_stamp)
        receipt: dict[str, Any] = {
            "received_at": storage.now(),
            "outcome": "rejected",
            "filename": name,
            "run": headers.run,
            "time_stamp": headers.time_stamp,
            "agent": headers.agent,
            "data_status": headers.data_status,
            "sender": request.sender,
            "size": 0,
            "sha256": None,
            "objects": None,
            "reason": None,
        }
        uploads: list[storage.Upload] = []
        try:
            upload = self.take_in(request, uploads)
            receipt.update(size=upload.size, sha256=upload.sha256)
            objects = self.check(upload, headers, name)
            receipt["objects"] = len(objects)
            outcome = self.storage.accept(upload, name, receipt)
        except (Refusal, storage.FileTooLarge) as refusal:
            self.record_refusal(receipt, refusal)
            raise
        finally:
            for upload in uploads:
                upload.discard()
        answer = {
            "status": 200,
            "filename": name,
            "message": SUCCESS,
            "received": {key: found.description for key, found in objects.items()},
            "size": upload.size,
            "sha256": upload.sha256,
        }
        if outcome != "stored":
            answer[outcome] = True
        return answer_json(answer)

    def take_in(self, request: AgentRequest, uploads: list[storage.Upload]) -> storage.Upload:
        """Write the body to an upload, one of those begun and noted in `uploads`, without having it in memory."""
        length = request.content_length
        if length is not None:
            if length > self.settings.max_file_size + (_FORM_OVERHEAD if is_form(request) else 0):
                raise storage.FileTooLarge(self.settings.max_file_size)
            self.storage.check_room(length)

        def begin(*_: object, **__: object) -> Any:
            uploads.append(self.storage.new_upload())
            return uploads[-1]

        if is_form(request):
            return self.take_in_form(request, begin)
        upload: storage.Upload = begin()
        while piece := request.body.read(_CHUNK):
            upload.write(piece)
        if not upload.size:
            raise Refusal(NO_FILE)
        return upload

    def take_in_form(self, request: AgentRequest, begin: Callable[..., Any]) -> storage.Upload:
        """Have the parts of a form written to uploads and return that of the part `file`."""
        parser = FormDataParser(
            stream_factory=begin,
            max_form_memory_size=_FORM_OVERHEAD,
            max_content_length=self.settings.max_file_size + _FORM_OVERHEAD,
            max_form_parts=_MAX_FORM_PARTS,
            silent=False,
        )
        body = cast(IO[bytes], request.body)
        try:
            _, fields, files = parser.parse(body, request.mimetype, request.content_length, request.mimetype_params)
        except ValueError as error:
            raise Refusal(f"The form is malformed: {error}") from error
        except RequestEntityTooLarge as error:
            raise Refusal(
                f"The form has more than {_MAX_FORM_PARTS} parts or {_FORM_OVERHEAD} bytes of fields"
            ) from error
        parts = files.getlist("file")
        if "file" in fields:
            raise Refusal("The part file has no file name and so is a field of the form, not a file")
        if len(parts) > 1:
            raise Refusal("The form has more than one part named file")
        upload = cast(storage.Upload, parts[0].stream) if parts else None
        if upload is None or not upload.size:
            raise Refusal(f"{NO_FILE}: a form must have a part named file, with the file")
        return upload

    def check(self, upload: storage.Upload, headers: UploadHeaders, name: str) -> dict[str, rootcheck.RootObject]:
        """Return the objects in an upload; raises Refusal where it is not what was sent or not a valid ROOT file."""
        if headers.sha256 is not None and not hmac.compare_digest(headers.sha256, upload.sha256):
            raise Refusal(f"The header sha256 differs from that of the {upload.size} bytes received, {upload.sha256}")
        try:
            with self.validating:
                return rootcheck.check_root_file(upload.path)
        except rootcheck.InvalidRootFile as error:
            self.storage.reject(upload, name)
            raise Refusal(NOT_VALID, reason=str(error)) from error

    def record_refusal(self, receipt: dict[str, Any], refusal: Exception) -> None:
        """Note a rejected upload in the receipts; a disk without room for that changes nothing about the verdict."""
        details = refusal.details if isinstance(refusal, Refusal) else {}
        receipt["reason"] = details.get("reason", str(refusal))
        try:
            self.storage.append_receipt(receipt)
        except (OSError, storage.StorageError):
            logger.exception("a rejected upload could not be noted in the receipts")

    # --- giving files back ---------------------------------------------------------------------------------------------

    def list_or_send(self, request: AgentRequest) -> Response:
        """GET /rest/api/files: list the accepted files, or send the one named in the query."""
        query = {name: only_one(request, name) for name in ("filename", "runNumber", "amoreAgent")}
        if query["filename"] is not None:
            return self.send(request, query["filename"])
        run = agent = None
        if query["runNumber"] is not None:
            run = check_number("query runNumber", query["runNumber"], storage.MAX_RUN)
        if query["amoreAgent"] is not None:
            agent = check_agent("query amoreAgent", query["amoreAgent"]).replace("_", "-")
        names = self.storage.names(lambda its_agent, its_run: agent in (None, its_agent) and run in (None, its_run))
        return answer_json({"files": names})

    def send(self, request: AgentRequest, name: str) -> Response:
        """GET /rest/api/files/<name>: send a file, or what of it the request asks for."""
        file = self.storage.open(name)
        try:
            return send_file(request, file)
        except BaseException:
            file.close()
            raise

    def not_implemented(self, request: AgentRequest) -> Response:
        """/: senders use this to try their token."""
        raise Refusal("Not implemented")


def is_form(request: AgentRequest) -> bool:
    return request.mimetype == "multipart/form-data"


def only_one(request: AgentRequest, name: str) -> str | None:
    """Return a parameter of the query; one that is there twice is refused."""
    values = request.args.getlist(name)
    if len(values) > 1:
        raise Refusal(f"The query has more than one {name}")
    return values[0] if values else None


# --- answers -----------------------------------------------------------------------------------------------------------


def answer_json(content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(content) + "\n", status, headers, mimetype="application/json")


_STATUS_OF = {storage.FileTooLarge: 413, storage.NoRoom: 507, storage.Unavailable: 503, storage.NoSuchFile: 404}


def refuse(request: AgentRequest, error: Exception) -> Response:
    """Turn what went wrong into an answer; the one place where that is done."""
    headers: Mapping[str, str] = {}
    details: Mapping[str, object] = {}
    message = str(error)
    if isinstance(error, Refusal):
        status, details = 400, error.details
    elif isinstance(error, storage.StorageError):
        status = _STATUS_OF[type(error)]
    elif isinstance(error, HTTPException) and error.code is not None:
        status, message = error.code, error.description or error.name
        headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    else:
        status, message = 500, "The receiver failed; its log has the details"
        logger.error("failed to answer %s %s", request.method, request.path, exc_info=error)
    return answer_json({"status": status, "message": message, "received": None, **details}, status, headers)


def send_file(request: AgentRequest, file: BinaryIO) -> Response:
    """Answer with a file, honouring conditions, Range and Want-Repr-Digest; closes the file with the response."""
    status = os.fstat(file.fileno())
    response = Response(mimetype="application/octet-stream", direct_passthrough=True)
    response.content_length = status.st_size
    response.last_modified = datetime.fromtimestamp(int(status.st_mtime), timezone.utc)
    response.set_etag(f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")
    if parse_dict_header(request.headers.get("Want-Repr-Digest", "")).get("sha-256", "0") != "0":
        response.headers["Repr-Digest"] = f"sha-256=:{b64encode(sha256_of(file)).decode()}:"  # RFC 9530
    # Conditions come before ranges, and a range of several pieces may be ignored (RFC 9110, 13.2.2 and 14.2).
    modified = is_resource_modified(request.environ, response.headers["ETag"], last_modified=response.last_modified)
    single = request.range is not None and len(request.range.ranges) == 1
    response.make_conditional(request, accept_ranges=modified and single, complete_length=status.st_size)
    response.headers["Accept-Ranges"] = "bytes"
    start = response.content_range.start or 0
    length = response.content_length or 0
    if request.method == "HEAD" or response.status_code not in (200, 206):
        file.close()
        response.response = []
    elif start + length == status.st_size or request.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        # The server may have the kernel copy the file; gunicorn stops at Content-Length, others at the end of the file.
        file.seek(start)
        response.response = wrap_file(request.environ, file, _CHUNK)
    else:
        response.response = read_range(file, start, length)
    return response


def read_range(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while length and (piece := file.read(min(length, _CHUNK))):
            yield piece
            length -= len(piece)


def sha256_of(file: BinaryIO) -> bytes:
    digest = hashlib.sha256()
    while piece := file.read(_CHUNK):
        digest.update(piece)
    return digest.digest()


def create_app(environ: Mapping[str, str] = os.environ) -> Receiver:
    """Return the WSGI application for these settings; raises ConfigurationError, naming the one that is wrong."""
    return Receiver(Settings.read(environ))
