"""The DQM receiver: agents push ROOT files over HTTP, it validates and stores them and gives them back.

`create_app(environ)` returns the WSGI application. It can be mounted in another one, run under gunicorn or called in tests.
"""

from __future__ import annotations

import argparse
import configparser
import contextlib
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import sysconfig
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, NotFound, PreconditionFailed, RequestEntityTooLarge
from werkzeug.formparser import MultiPartParser
from werkzeug.http import is_resource_modified, parse_dict_header
from werkzeug.routing import Map, Rule
from werkzeug.sansio.utils import get_content_length
from werkzeug.wrappers import Request, Response
from werkzeug.wsgi import get_input_stream, wrap_file

import rootcheck
import storage

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

logger = logging.getLogger("dqm_receiver")

_PREFIX = "DQM_RECEIVER_"
_CHUNK = 1 << 18  # bytes read at once
_FORM_CHUNK = 1 << 19  # the same of a form: what gunicorn has received beyond that it copies for the next reading
_FORM_END = 256  # bytes in which the end of a form's last part fits: RFC 2046 allows a boundary 70
_FORM_OVERHEAD = 1 << 20  # bytes a form may have beside its file
_MAX_FORM_PARTS = 16
REASON_CLASSES = ("not valid", "sha256", "no file", "too large", "form", "broken")
_MAX_AGENTS = 100  # agents with metrics of their own
OTHER_AGENTS = "(other)"  # no agent can have this name
_MIN_DISCARD = 64 << 20  # bytes of a refused body that are read in any case, so that its sender sees the answer

SUCCESS = "Successfully received file and extracted information"
NO_TOKEN = "Must pass a token!"
WRONG_TOKEN = "Received token, but it is invalid!"
NOT_VALID = "Successfully received the file, but the file is not valid! Perhaps it was corrupted?"
NO_FILE = "No file uploaded and the payload was empty"


# --- settings ----------------------------------------------------------------------------------------------------------


class ConfigurationError(RuntimeError):
    """A setting is missing or wrong; the text names it. (gunicorn prints a RuntimeError as one line and ends.)"""


@dataclass(frozen=True)
class Settings:
    """What the environment variables `DQM_RECEIVER_…` say; sizes in bytes."""

    data_folder: Path
    tokens: Mapping[str, tuple[bytes, ...]]  # by the sender's name: SHA-256 digests of its tokens
    max_file_size: int
    min_free_space: int  # to be left on the disk
    max_rejected: int  # kept of invalid uploads
    metrics: bool  # whether /metrics answers

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings; raises ConfigurationError."""
        metrics = environ.get(f"{_PREFIX}METRICS", "on")
        if metrics not in ("on", "off"):
            raise ConfigurationError(f"{_PREFIX}METRICS must be on or off, not {metrics!r}")
        return cls(
            data_folder=Path(environ.get(f"{_PREFIX}DATA_FOLDER") or "data"),
            tokens=_read_tokens(environ.get(f"{_PREFIX}TOKEN"), environ.get(f"{_PREFIX}TOKENS_FILE")),
            metrics=metrics == "on",
            max_file_size=_read_size(environ, "MAX_FILE_SIZE", 2 << 30),
            min_free_space=_read_size(environ, "MIN_FREE_SPACE", 1 << 30),
            max_rejected=_read_size(environ, "MAX_REJECTED", 256 << 20),
        )


_TOKEN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def _read_tokens(token: str | None, path: str | None) -> dict[str, tuple[bytes, ...]]:
    """Return the digests of the one token and of those in the file: section [tokens], `name = sha256 [sha256 ...]`."""
    tokens: dict[str, tuple[bytes, ...]] = {}
    if token:
        if token != token.strip() or "," in token or not token.isprintable():  # no header can carry that unchanged
            raise ConfigurationError(
                f"{_PREFIX}TOKEN has a comma, a control character, or a blank at its beginning or end"
            )
        tokens["default"] = (_digest(token.encode()),)
    if path:
        parser = configparser.ConfigParser(interpolation=None, delimiters="=")
        parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
        try:
            parser.read_string(Path(path).read_text())
            lines = dict(parser["tokens"])
            readable_by_all = os.stat(path).st_mode & stat.S_IROTH
        except OSError as error:
            raise ConfigurationError(f"{_PREFIX}TOKENS_FILE {path}: {error.strerror}") from error
        except (UnicodeDecodeError, configparser.Error, KeyError):  # whose texts quote the file
            raise ConfigurationError(
                f"{_PREFIX}TOKENS_FILE {path}: not a section [tokens] with lines `name = sha256 of the token, in hex`"
            ) from None
        for name, hashes in lines.items():
            # No word of the line itself: somebody may have written the token there.
            if not _TOKEN_NAME.fullmatch(name) or not re.fullmatch(r"\s*([0-9a-fA-F]{64}\s*)+", hashes):
                raise ConfigurationError(
                    f"{_PREFIX}TOKENS_FILE {path}: a line is not `name = sha256 of the token, in hex`"
                )
            tokens[name] = tokens.get(name, ()) + tuple(bytes.fromhex(one) for one in hashes.split())
        if readable_by_all:
            logger.warning("everybody on this host can read the token file %s", path)
        if not lines:
            raise ConfigurationError(f"{_PREFIX}TOKENS_FILE {path}: the section [tokens] is empty")
    if not tokens:
        raise ConfigurationError(f"{_PREFIX}TOKEN is not set: the receiver needs the token that senders pass")
    return tokens


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _read_size(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(_PREFIX + name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigurationError(f"{_PREFIX}{name} must be a number of bytes, not {text!r}")
    return int(text)


# --- refusals ----------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request that is the sender's to mend: its class for the metrics, and why the file is not valid, where it is not."""

    def __init__(self, message: str, *, reason_class: str = "request", reason: str | None = None) -> None:
        super().__init__(message)
        self.reason_class = reason_class
        self.reason = reason


# --- requests ----------------------------------------------------------------------------------------------------------


class AgentRequest(Request):
    """A request, with its body and the name of the token that it carries."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        super().__init__(environ)
        self.body = Body(environ)
        self.sender = ""
        self.noted = False  # whether the log has a line about it


class Body:
    """A request's body: what goes wrong while it is read is the sender's doing and no fault of ours."""

    def __init__(self, environ: WSGIEnvironment) -> None:
        self._stream = get_input_stream(environ)
        self._length = get_content_length(environ.get("CONTENT_LENGTH"), environ.get("HTTP_TRANSFER_ENCODING")) or 0
        self.received = 0  # bytes so far

    def read_form(self, size: int) -> bytes:
        """Like `read`, but the end comes apart: Werkzeug looks slowly through the piece with the last boundary in it."""
        left = self._length - self.received
        piece = self.read(min(size, left - _FORM_END) if left > _FORM_END else size)
        # Of a piece that ends within the two dashes behind a boundary, Werkzeug takes the line break before it for content.
        return piece + self.read(1) if piece.endswith(b"-") else piece

    def read(self, size: int = -1) -> bytes:
        try:
            piece = self._stream.read(size)
        except Exception as error:  # each server has its own for a connection that ends or stalls, or a malformed chunk
            raise Refusal("The body ended before it was complete, or was malformed", reason_class="broken") from error
        self.received += len(piece)
        if not piece and self.received < self._length:  # gunicorn has no error for this
            message = f"The body ended after {self.received} of {self._length} bytes"
            raise Refusal(message, reason_class="broken")
        return piece

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
        try:
            self.storage = storage.Storage(
                settings.data_folder,
                max_file_size=settings.max_file_size,
                min_free_space=settings.min_free_space,
                max_rejected=settings.max_rejected,
            )
        except OSError as error:
            folder = settings.data_folder
            raise ConfigurationError(f"{_PREFIX}DATA_FOLDER {folder} cannot be used: {error.strerror}") from error
        cores = len(os.sched_getaffinity(0))
        # By `wsgi.multiprocess`: the processes of gunicorn.conf.py, four at the most, share the cores.
        slots = {False: cores, True: max(1, cores // 4)}
        self.validating = {several: threading.BoundedSemaphore(number) for several, number in slots.items()}
        self.routes = Map(
            [
                Rule("/rest/api/files", methods=["POST"], endpoint=self.receive),
                Rule("/rest/api/files", methods=["GET"], endpoint=self.list_or_send),
                Rule("/rest/api/files/<name>", methods=["GET"], endpoint=self.send),
                Rule("/rest/api/runs", methods=["GET"], endpoint=self.list_runs),
                Rule("/rest/api/runs/<run>", methods=["GET"], endpoint=self.describe_run),
                Rule("/rest/api/health", methods=["GET"], endpoint=self.health),
                Rule("/rest/api/openapi.json", methods=["GET"], endpoint=self.describe_api),
                Rule("/metrics", methods=["GET"], endpoint=self.metrics),
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
            if request.method == "POST" and not request.noted:
                logger.info(
                    "refused status=%s sender=%s message=%s",
                    *map(json.dumps, (response.status_code, request.sender, str(error))),
                )
            request.body.discard(max(self.settings.max_file_size, _MIN_DISCARD))
        return response(environ, start_response)

    def dispatch(self, request: AgentRequest) -> Response:
        try:
            handler, arguments = self.routes.bind("").match(request.path, request.method)
        except HTTPException:
            self.check_token(request)  # without one, nobody learns what there is
            raise
        if handler not in (self.health, self.metrics, self.describe_api):
            request.sender = self.check_token(request)
        response: Response = handler(request, **arguments)
        return response

    def check_token(self, request: AgentRequest) -> str:
        """Return the name of the token that the request carries; every known one is compared, in constant time."""
        token = request.headers.get("token")
        if not token:
            raise Refusal(NO_TOKEN)
        digest = _digest(token.encode("latin-1"))  # WSGI hands on a header's bytes as latin-1
        tokens = self.settings.tokens.items()
        names = [name for name, digests in tokens for known in digests if hmac.compare_digest(known, digest)]
        if not names:
            raise Refusal(WRONG_TOKEN)
        return names[0]

    # --- receiving a file ----------------------------------------------------------------------------------------------

    def receive(self, request: AgentRequest) -> Response:
        """POST /rest/api/files: validate and store a file."""
        began = time.monotonic()
        headers = UploadHeaders.read(request.headers)
        name = storage.file_name(headers.agent, headers.run, headers.time_stamp)
        request.noted = True
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
            "reason_class": None,
            "seconds": None,
            "validation_seconds": None,
        }
        uploads: list[storage.Upload] = []
        try:
            upload = self.take_in(request, uploads)
            receipt.update(size=upload.size, sha256=upload.sha256)
            objects = self.check(upload, headers, receipt, request.is_multiprocess)
            receipt["objects"] = len(objects)
            answer = {
                "status": 200,
                "filename": name,
                "message": SUCCESS,
                "received": {key: found.description for key, found in objects.items()},
                "size": upload.size,
                "sha256": upload.sha256,
            }
            self.storage.accept(upload, receipt, began)
        except Exception as error:
            self.record_failure(receipt, error, began)
            raise
        finally:
            for begun in uploads:
                begun.discard()
        log_upload(receipt)
        if receipt["outcome"] != "stored":
            answer[receipt["outcome"]] = True
        return answer_json(answer)

    def take_in(self, request: AgentRequest, uploads: list[storage.Upload]) -> storage.Upload:
        """Write the body to an upload, one of those begun and noted in `uploads`, without having it in memory."""
        length = request.content_length
        if length is not None:
            if length > self.settings.max_file_size + (_FORM_OVERHEAD if is_form(request) else 0):
                raise storage.FileTooLarge(self.settings.max_file_size)
            self.storage.check_room(length)

        def begin(*_: object, **__: object) -> Any:
            if sum(upload.size for upload in uploads) > self.settings.max_file_size:
                raise storage.FileTooLarge(self.settings.max_file_size)
            uploads.append(self.storage.new_upload())
            return uploads[-1]

        if is_form(request):
            return self.take_in_form(request, begin)
        upload: storage.Upload = begin()
        while piece := request.body.read(_CHUNK):
            upload.write(piece)
        if not upload.size:
            raise Refusal(NO_FILE, reason_class="no file")
        return upload

    def take_in_form(self, request: AgentRequest, begin: Callable[..., Any]) -> storage.Upload:
        """Have the parts of a form written to uploads and return that of the part `file`."""
        boundary = request.mimetype_params.get("boundary", "")
        if not boundary or not boundary.isascii():
            raise Refusal("The form is malformed: it has no boundary of ASCII", reason_class="form")
        parser = MultiPartParser(
            stream_factory=begin,
            max_form_memory_size=_FORM_OVERHEAD,
            max_form_parts=_MAX_FORM_PARTS,
            buffer_size=_FORM_CHUNK,
        )
        try:
            body = cast(IO[bytes], SimpleNamespace(read=request.body.read_form))
            fields, files = parser.parse(body, boundary.encode(), request.content_length)
        except ValueError as error:
            if not request.body.received:
                raise Refusal(NO_FILE, reason_class="no file") from error
            what = "the head of a part (a file name?) is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise Refusal(f"The form is malformed: {what}", reason_class="form") from error
        except RequestEntityTooLarge as error:
            limits = f"{_MAX_FORM_PARTS} parts or {_FORM_OVERHEAD} bytes of fields"
            raise Refusal(f"The form has more than {limits}", reason_class="form") from error
        parts = files.getlist("file")
        if "file" in fields:
            raise Refusal("The part file has no file name and so is a field, not a file", reason_class="form")
        if len(parts) > 1:
            raise Refusal("The form has more than one part named file", reason_class="form")
        upload = cast(storage.Upload, parts[0].stream) if parts else None
        if upload is None or not upload.size:
            raise Refusal(f"{NO_FILE}: a form must have a part named file, with the file", reason_class="no file")
        return upload

    def check(
        self, upload: storage.Upload, headers: UploadHeaders, receipt: dict[str, Any], several: bool
    ) -> dict[str, rootcheck.RootObject]:
        """Return the objects in an upload; raises Refusal where it is not what was sent or not a valid ROOT file."""
        if headers.sha256 is not None and headers.sha256 != upload.sha256:
            message = f"The header sha256 differs from that of the {upload.size} bytes received, {upload.sha256}"
            raise Refusal(message, reason_class="sha256")
        with self.validating[several], storage.os_errors():
            began = time.monotonic()
            try:
                return rootcheck.check_root_file(upload.path)
            except rootcheck.InvalidRootFile as error:
                reason = str(error)
            finally:
                receipt["validation_seconds"] = round(time.monotonic() - began, 6)
        try:
            self.storage.reject(upload, receipt["filename"])
        except (OSError, storage.StorageError):
            logger.exception("an invalid upload could not be kept")
        raise Refusal(NOT_VALID, reason_class="not valid", reason=reason)

    def record_failure(self, receipt: dict[str, Any], error: Exception, began: float) -> None:
        """Note in receipts and log why an upload failed; what is no verdict on it, as a full disk, in the log only."""
        receipt.update(outcome="refused", reason=str(error), seconds=round(time.monotonic() - began, 6))
        if isinstance(error, Refusal):
            receipt.update(outcome="rejected", reason=error.reason or str(error), reason_class=error.reason_class)
        elif isinstance(error, storage.FileTooLarge):
            receipt.update(outcome="rejected", reason_class="too large")
        elif not isinstance(error, storage.StorageError):
            receipt["reason"] = repr(error)
        if receipt["outcome"] == "rejected":
            try:
                self.storage.check_disk()  # which an upload that was refused before it began has not met
                self.storage.append_receipt(receipt, began)
            except (OSError, storage.StorageError):
                logger.exception("a rejected upload could not be noted in the receipts")
        log_upload(receipt)

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

    # --- saying what arrived -------------------------------------------------------------------------------------------

    def list_runs(self, request: AgentRequest) -> Response:
        """GET /rest/api/runs: list the runs of which something has come."""
        response = answer_json({"runs": self.storage.runs()})
        response.add_etag()
        return if_changed(request, response)

    def describe_run(self, request: AgentRequest, run: str) -> Response:
        """GET /rest/api/runs/<run>: say what has come, by agent."""
        number = check_number("run in the path", run, storage.MAX_RUN)
        tag = self.storage.receipts_tag(number)
        response = Response(mimetype="application/json")
        response.set_etag(tag)
        if if_changed(request, response).status_code == 304:
            return response
        record = self.storage.run(number)
        with record.lock:
            agents = {agent: describe_agent(of_run) for agent, of_run in sorted(record.agents.items())}
        started = [agent for agent in agents.values() if agent["started"]]
        complete = bool(started) and all(agent["ended"] for agent in started)
        content = {"run": number, "complete": complete, "agents": agents}
        response.set_data(json.dumps(content) + "\n")
        return response

    def health(self, request: AgentRequest) -> Response:
        """GET /rest/api/health: say whether the folder can be written and has room."""
        try:
            self.storage.check_health()
        except (OSError, storage.StorageError) as error:
            # Nobody needs a token here, and an OSError's text has the path of the folder.
            message = f"The data folder does not work: {error.strerror}" if isinstance(error, OSError) else str(error)
            return answer_json({"status": 503, "message": message, "received": None}, 503)
        return answer_json({"status": 200, "message": "The data folder can be written and has room"})

    def metrics(self, request: AgentRequest) -> Response:
        """GET /metrics: say it in numbers, for Prometheus."""
        if not self.settings.metrics:
            raise NotFound
        registry = CollectorRegistry()
        registry.register(Collector(self.storage))
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    def describe_api(self, request: AgentRequest) -> Response:
        """GET /rest/api/openapi.json: give out openapi.yaml, which is JSON and so YAML, too."""
        path = Path(__file__).with_name("openapi.yaml")  # in a checkout; else where setup.cfg has it installed
        if not path.exists():
            path = Path(sysconfig.get_path("data"), "share", "dqm-receiver", path.name)
        return Response(path.read_bytes(), mimetype="application/json")

    def not_implemented(self, request: AgentRequest) -> Response:
        """/: senders use this to try their token."""
        raise Refusal("Not implemented")


def describe_agent(record: storage.AgentRecord) -> dict[str, object]:
    return {
        "files": record.files,
        "bytes": record.bytes,
        "duplicates": record.outcomes["duplicate"],
        "rejected": record.outcomes["rejected"],
        "first_time_stamp": record.first_time_stamp,
        "last_time_stamp": record.last_time_stamp,
        "started": record.started,
        "ended": record.ended,
        "last_arrival": record.last_arrival,
    }


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


_STATUS_OF = {
    storage.FileTooLarge: 413,
    storage.NoRoom: 507,
    storage.Unavailable: 503,
    storage.NoSuchFile: 404,
    storage.NoSuchRun: 404,
}


def refuse(request: AgentRequest, error: Exception) -> Response:
    """Turn what went wrong into an answer; the one place where that is done."""
    headers: Mapping[str, str] = {}
    content: dict[str, object] = {"status": 400, "message": str(error), "received": None}
    if isinstance(error, Refusal):
        if error.reason is not None:
            content["reason"] = error.reason
    elif isinstance(error, storage.StorageError):
        content["status"] = _STATUS_OF[type(error)]
    elif isinstance(error, HTTPException) and error.code is not None:
        content.update(status=error.code, message=error.description or error.name)
        headers = {name: value for name, value in error.get_headers() if name != "Content-Type"}
    else:
        content.update(status=500, message="The receiver failed; its log has the details")
        logger.error("failed to answer %s %r", request.method, request.path, exc_info=error)
    return answer_json(content, cast(int, content["status"]), headers)


def log_upload(receipt: Mapping[str, Any]) -> None:
    """Write one line about an upload to the log, as key=value."""
    keys = ("outcome", "sender", "run", "agent", "filename", "size", "seconds", "reason")
    facts = ((key, receipt[key]) for key in keys if receipt[key] is not None)
    logger.info(
        "upload %s", " ".join(f"{key}={json.dumps(fact) if isinstance(fact, str) else fact}" for key, fact in facts)
    )


def send_file(request: AgentRequest, file: BinaryIO) -> Response:
    """Answer with a file, honouring conditions, Range and Want-Repr-Digest; closes the file with the response."""
    status = os.fstat(file.fileno())
    response = Response(mimetype="application/octet-stream", direct_passthrough=True)
    response.content_length = status.st_size
    response.last_modified = datetime.fromtimestamp(int(status.st_mtime), timezone.utc)
    response.set_etag(f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}")
    if parse_dict_header(request.headers.get("Want-Repr-Digest", "")).get("sha-256", "0") != "0":
        response.headers["Repr-Digest"] = f"sha-256=:{b64encode(sha256_of(file)).decode()}:"  # RFC 9530
    # Conditions come before ranges; what is no single range of bytes may be ignored (RFC 9110, 13.2.2 and 14.2).
    environ = conditions(request)
    modified = is_resource_modified(environ, response.headers["ETag"], last_modified=response.last_modified)
    ranges = request.range if request.method == "GET" and modified else None
    single = ranges is not None and ranges.units == "bytes" and len(ranges.ranges) == 1
    if request.headers.get("If-Range") not in (None, response.headers["ETag"]):
        single = False  # a date does not tell files of one second apart (RFC 9110, 13.1.5)
    if ranges is not None and single and -(ranges.ranges[0][0] or 0) > status.st_size:
        single = False  # the last so many bytes, which are more than there are
    response.make_conditional(environ, accept_ranges=single, complete_length=status.st_size)
    since = request.if_unmodified_since
    late = not request.if_match and since is not None and response.last_modified > since
    if response.status_code == 412 or late:
        raise PreconditionFailed("The file is not the one that the condition names")
    response.headers["Accept-Ranges"] = "bytes"
    start = response.content_range.start or 0
    length = response.content_length or 0
    if request.method == "HEAD" or response.status_code not in (200, 206):
        file.close()
        response.response = []
    elif length == status.st_size or request.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
        # The server may have the kernel copy the file; gunicorn copies the range, others (uWSGI) the file from its start.
        file.seek(start)
        response.response = wrap_file(request.environ, file, _CHUNK)
    else:
        response.response = read_range(file, start, length)
    return response


def conditions(request: AgentRequest) -> WSGIEnvironment:
    """Return the environment without the condition that everything here meets and Werkzeug does not know."""
    if not request.if_match.star_tag:
        return request.environ
    return {name: value for name, value in request.environ.items() if name != "HTTP_IF_MATCH"}


def if_changed(request: AgentRequest, response: Response) -> Response:
    """Return an answer with an ETag, or 304 where the sender has it; raises PreconditionFailed."""
    response.make_conditional(conditions(request))
    if response.status_code == 412:
        raise PreconditionFailed("What is here is not what the condition names")
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


# --- metrics -----------------------------------------------------------------------------------------------------------


def collect_metrics(folder: storage.Storage) -> Iterator[Metric]:
    """Yield the families of metrics: all come from the folder, so that they are right whichever worker is asked."""
    of_agents: dict[str, list[tuple[str, Counter[str], int, str]]] = {}
    reasons = Counter[str]()
    durations: dict[str, Counter[float]] = {}
    sums: dict[str, float] = {}
    for run in folder.runs():
        with contextlib.suppress(storage.NoSuchRun):  # archived a moment ago
            record = folder.run(run)
            with record.lock:
                for agent, of_run in record.agents.items():
                    facts = of_run.first_arrival, of_run.outcomes.copy(), of_run.bytes, of_run.last_accepted
                    of_agents.setdefault(agent, []).append(facts)
                reasons.update(record.reasons)
                for field, counts in record.durations.items():
                    durations.setdefault(field, Counter()).update(counts)
                    sums[field] = sums.get(field, 0.0) + record.sums[field]
    # Whoever has a token may invent agents; those that came first keep series of their own.
    for agent in sorted(of_agents, key=lambda agent: min(first for first, *_ in of_agents[agent]))[_MAX_AGENTS:]:
        of_agents.setdefault(OTHER_AGENTS, []).extend(of_agents.pop(agent))

    name = "dqm_receiver_"
    uploads = CounterMetricFamily(name + "uploads", "Uploads by outcome", labels=("agent", "outcome"))
    volume = CounterMetricFamily(name + "accepted_bytes", "Bytes of the files that got a name", labels=("agent",))
    last = GaugeMetricFamily(
        name + "last_accepted_timestamp_seconds", "Time of the last accepted file", labels=("agent",)
    )
    for agent, of_runs in of_agents.items():
        for outcome in storage.OUTCOMES:
            uploads.add_metric((agent, outcome), sum(outcomes[outcome] for _, outcomes, _, _ in of_runs))
        volume.add_metric((agent,), sum(size for _, _, size, _ in of_runs))
        accepted = max(accepted for *_, accepted in of_runs)
        if accepted:
            last.add_metric((agent,), storage.seconds_of(accepted))
    rejections = CounterMetricFamily(name + "rejections", "Rejected uploads by class of reason", labels=("reason",))
    for reason in sorted(
        {*REASON_CLASSES, *reasons}
    ):  # those with none, too: an increase is seen only from a number on
        rejections.add_metric((reason,), reasons[reason])
    yield from (uploads, volume, last, rejections)

    for field, what in (("seconds", "Seconds to take in a file"), ("validation_seconds", "Seconds to validate a file")):
        counts = durations.get(field, Counter())
        below = accumulate(counts[bound] for bound in storage.DURATIONS)
        bounds = (f"{bound:g}".replace("inf", "+Inf") for bound in storage.DURATIONS)
        buckets = list(zip(bounds, below, strict=True))
        yield HistogramMetricFamily(f"{name}upload_{field}", what, buckets=buckets, sum_value=sums.get(field, 0.0))
    yield GaugeMetricFamily(name + "uploads_in_progress", "Uploads under way", folder.uploads_in_progress())
    yield GaugeMetricFamily(name + "free_bytes", "Free bytes on the disk of the data folder", folder.free_space())


class Collector:
    """What prometheus-client asks for metrics."""

    def __init__(self, folder: storage.Storage) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        return collect_metrics(self._folder)


def create_app(environ: Mapping[str, str] = os.environ) -> Receiver:
    """Return the WSGI application for these settings; raises ConfigurationError, naming the one that is wrong."""
    return Receiver(Settings.read(environ))


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a token for a sender."""
    parser = argparse.ArgumentParser(prog="python -m receiver", description="The DQM receiver's token maker.")
    commands = parser.add_subparsers(required=True, metavar="token")
    command = commands.add_parser("token", help="make a token, show it once and print the line for the token file")
    command.add_argument("name", metavar="NAME", help="who is to send with it")
    name = parser.parse_args(arguments).name
    if not _TOKEN_NAME.fullmatch(name):
        parser.error("NAME must be 1 to 64 of the characters A-Z, a-z, 0-9, _, . and -")
    token = secrets.token_urlsafe(32)
    print(f"The token of {name}, which is shown only now:\n\n    {token}\n")
    print(f"The line for the section [tokens] of the token file:\n\n    {name} = {_digest(token.encode()).hex()}")


if __name__ == "__main__":
    main()
