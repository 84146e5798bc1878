"""The DQM receiver: it takes the ROOT files that agents push over HTTP, validates, stores, lists and serves them.

`create_app(environ)` returns the WSGI application. It can be mounted in another one, run under gunicorn or called in tests.

An upload is received, validated, committed, recorded and answered (`Receiver.receive`). storage.py explains the commit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import select
import socket
import sysconfig
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.wrappers import Response

import rootcheck
import storage
import turns
from downloads import conditional, send_file
from durable import StorageError, os_errors
from receipt_pages import Query, etag_of, newest
from receipts import OUTCOMES, Receipt, ReceiptLog, RunNotFound
from receiver_metrics import Metrics
from receiver_requests import (
    BODY_CHUNK,
    FORM_OVERHEAD,
    NO_FILE,
    ClientGone,
    FileRejected,
    ReceiverRequest,
    RequestRefused,
    UploadHeaders,
    check_agent,
    check_number,
    receive_form,
)
from receiver_settings import ConfigurationError, Settings
from summaries import Summaries
from uploads import FileTooLarge, Upload

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

__all__ = ["ConfigurationError", "Receiver", "create_app"]
__version__ = "0.2.0"

logger = logging.getLogger("dqm_receiver")

_REFUSED_BYTES, _REFUSED_SECONDS = 1 << 20, 5.0  # limits on reading a refused body if the token is not valid
_RATE_TIME = 60.0  # seconds over which a refused body must keep its minimum rate
_MAX_RECEIVED = 1 << 20  # bytes of JSON that describe the objects of a file

SUCCESS = "Successfully received file and extracted information"
NO_TOKEN = "Must pass a token!"
WRONG_TOKEN = "Received token, but it is invalid!"
NOT_VALID = "Successfully received the file, but the file is not valid! Perhaps it was corrupted?"

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PAGE_FILES = ("index.html", "page.css", "page.js")
_JSROOT_FILES = ("jsroot.min.js", "base/zstd.mjs", "base/lzma.mjs")
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript"}


# --- the application ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """An address, the method that works there, its handler, and the query parameters that it knows (None: any)."""

    path: str
    method: str
    handler: Callable[..., Response]
    parameters: frozenset[str] | None = frozenset()
    needs_token: bool = True


class FairSlots:
    """Limits the validations that run at once. Senders that wait take turns (round robin), however many uploads each has."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[threading.Event]] = OrderedDict()

    @contextlib.contextmanager
    def take(self, sender: str) -> Iterator[None]:
        """Wait for a slot, hold it, and pass it on."""
        slot = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                slot.set()
            else:
                self._waiting.setdefault(sender, deque()).append(slot)
        if not slot.is_set():
            with turns.waiting():
                slot.wait()
        try:
            yield
        finally:
            self._pass_on(sender)

    def _pass_on(self, last: str) -> None:
        with self._lock:
            if last in self._waiting:
                self._waiting.move_to_end(last)  # it has had its turn, so the others come first
            if not self._waiting:
                self._free += 1
                return
            sender, slots = self._waiting.popitem(last=False)
            slots.popleft().set()
            if slots:
                self._waiting[sender] = slots  # at the end of the queue


class Receiver:
    """The WSGI application."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        try:
            self.storage = storage.Storage(
                settings.data_folder,
                self.record,
                max_file_size=settings.max_file_size,
                min_free_space=settings.min_free_space,
                max_rejected=settings.max_rejected,
            )
            self.receipts = ReceiptLog(settings.data_folder)
        except (OSError, StorageError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            folder = f"DQM_RECEIVER_DATA_FOLDER {settings.data_folder}"
            raise ConfigurationError(f"{folder} cannot be used: {why}") from error
        self.summaries = Summaries(self.receipts)
        self.metrics = Metrics(str(self.storage.folder))
        cores = len(os.sched_getaffinity(0))
        # By `wsgi.multiprocess`: the processes of a server that has several share the cores (gunicorn.conf.py: at most four).
        self.validation_slots = {False: FairSlots(cores), True: FairSlots(max(1, cores // 4))}
        paged = frozenset({"limit", "before"})
        of_receipts = paged | {"amoreAgent", "outcome"}
        of_files = paged | {"filename", "runNumber", "amoreAgent"}
        self.routes = [
            Route("/rest/api/files", "POST", self.receive),
            Route("/rest/api/check", "POST", self.check),
            Route("/rest/api/files", "GET", self.list_files, of_files),
            Route("/rest/api/files/<name>", "GET", self.send),
            Route("/rest/api/runs", "GET", self.list_runs, paged),
            Route("/rest/api/runs/<run>", "GET", self.describe_run),
            Route("/rest/api/runs/<run>/receipts", "GET", self.list_receipts, of_receipts),
            Route("/rest/api/receipts", "GET", self.list_receipts, of_receipts),
            Route("/rest/api/health", "GET", self.health, None, needs_token=False),
            Route("/rest/api/openapi.json", "GET", self.describe_api, None, needs_token=False),
            Route("/metrics", "GET", self.show_metrics, None, needs_token=False),
            Route("/view/", "GET", self.show_page, None, needs_token=False),
            Route("/view/<path:name>", "GET", self.show_page, None, needs_token=False),
        ]
        rules = [Rule(route.path, methods=[route.method], endpoint=route) for route in self.routes]
        rules.append(Rule("/", endpoint=Route("/", "", self.not_implemented, None)))
        self._rules = Map(rules, strict_slashes=False, merge_slashes=False)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return self.wsgi_app(environ, start_response)

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = ReceiverRequest(environ)
        try:
            response = self.dispatch(request)
        except Exception as error:  # noqa: BLE001  the one place that turns exceptions into answers
            response = self.refuse(request, as_refusal(request, error))
        return response(environ, start_response)

    def dispatch(self, request: ReceiverRequest) -> Response:
        try:
            route, arguments = self._rules.bind("").match(request.path, request.method)
        except HTTPException:
            self.authenticate(request)  # a client without a token must not learn which addresses exist
            raise
        if route.needs_token:
            self.authenticate(request)
        if route.parameters is not None:
            for name in request.args:
                if name not in route.parameters:
                    known = ", ".join(sorted(route.parameters)) or "none"
                    raise RequestRefused(f"The query parameter {name!r} is not known here; known: {known}", "query")
        response: Response = route.handler(request, **arguments)
        return response

    def authenticate(self, request: ReceiverRequest) -> None:
        """Find the token of a request; raises RequestRefused if it is missing or wrong, or may not do this."""
        token = request.headers.get("token", "").strip("\t")
        if not token:
            where = ", not in Authorization" if "Authorization" in request.headers else ""
            raise RequestRefused(NO_TOKEN, "token", reason=f"send the token in the header `token`{where}")
        request.token = self.settings.find_token(token)
        if request.token is None:
            twice = "the header token came twice" if "," in token else None  # no token has a comma
            raise RequestRefused(WRONG_TOKEN, "token", reason=twice)
        if request.method not in ("GET", "HEAD") and request.path != "/" and not request.token.may_send:
            raise RequestRefused(f"The token {request.token.name} may only read", "forbidden", status=403)

    # An exception refers to the frames that it has passed. If one of them refers to the exception, only the garbage collector
    # frees them, with the request and its buffers. So an exception is handled in methods that it does not pass.

    def refuse(self, request: ReceiverRequest, refusal: RequestRefused) -> Response:
        """Count a refusal, write its line to the log, and return the answer."""
        if request.is_check:
            self.metrics.count_check("refused")
        else:
            self.metrics.count_rejection(refusal.reason_class)
        if not request.is_logged:
            log(
                "refused",
                status=refusal.status,
                method=request.method,
                path=request.path,
                **request.facts,
                reason_class=refusal.reason_class,
                reason=refusal.reason or str(refusal),
            )
        self.discard_body(request)
        return error_response(refusal)

    def discard_body(self, request: ReceiverRequest) -> None:
        """Read on after a refusal, so that the sender sees the answer; without a valid token, only for a short time."""
        limit = self.settings.max_file_size + FORM_OVERHEAD - request.body.received if request.token else 0
        discard = request.environ.get("dqm_receiver.discard")  # gunicorn_worker.py reads on after the answer
        if discard is None:
            request.body.discard(limit or _REFUSED_BYTES, _RATE_TIME if limit else _REFUSED_SECONDS)
        elif limit > 0:
            discard(limit)

    # --- receiving a file ----------------------------------------------------------------------------------------------

    def receive(self, request: ReceiverRequest) -> Response:
        """POST /rest/api/files: receive the body, validate, commit, record, answer."""
        headers = self.read_head(request, required=True)
        self.receipts.folder.open()  # a folder that cannot be used is found before the commit
        with (
            self.metrics.upload_in_progress(),
            self.recording_rejections(request, headers),
            self.receive_body(request) as upload,
        ):
            objects, validation_seconds = self.validate(request, upload, headers)
            make = partial(
                make_receipt,
                request,
                headers,
                size=upload.size,
                sha256=upload.sha256,
                objects=len(objects),
                validation_seconds=validation_seconds,
            )
            receipt = self.storage.commit(upload, headers.file_name, make)
        self.report(request, receipt)
        content = success_content(upload, objects, headers.file_name)
        return json_response(content if receipt.outcome == "stored" else content | {receipt.outcome: True})

    def record(self, batch: Sequence[Receipt]) -> Sequence[Receipt | StorageError]:
        """Append the receipts of uploads that were committed together, for the storage, which is made before the log."""
        return self.receipts.append(batch)

    def check(self, request: ReceiverRequest) -> Response:
        """POST /rest/api/check: give the answer that the upload would get, and store nothing."""
        request.is_check = True
        headers = self.read_head(request, required=False)
        with self.receive_body(request) as upload:
            objects, _ = self.validate(request, upload, headers)
            outcome = self.storage.compare(upload, headers.file_name) if headers.file_name else "stored"
            content = success_content(upload, objects, headers.file_name)
        self.metrics.count_check("valid")
        log("check", status=200, **request.facts, size=upload.size)
        return json_response(content if outcome == "stored" else content | {outcome: True})

    def read_head(self, request: ReceiverRequest, *, required: bool) -> UploadHeaders:
        """Check the headers of an upload; raises RequestRefused."""
        encoding = request.headers.get("Content-Encoding", "identity")
        if encoding.lower() != "identity":
            message = f"The body has the Content-Encoding {encoding!r}: send it as it is"
            raise RequestRefused(message, "encoding", status=415)
        if "Transfer-Encoding" in request.headers and not request.environ.get("wsgi.input_terminated"):
            message = "The server does not hand on a chunked body: send it with a Content-Length"
            raise RequestRefused(message, "length_required", status=411)
        headers = UploadHeaders.read(request.headers, required=required)
        expected, token = self.settings.agents, request.token
        if headers.agent and expected and headers.agent not in expected:
            message = f"The agent {headers.agent} is not expected here; expected: {' '.join(expected)}"
            raise RequestRefused(message, "agent")
        if headers.agent and token and token.agents and headers.agent not in token.agents:
            message = f"The token {token.name} may send as {' '.join(token.agents)}, not as {headers.agent}"
            raise RequestRefused(message, "forbidden", status=403)
        return headers

    @contextlib.contextmanager
    def recording_rejections(self, request: ReceiverRequest, headers: UploadHeaders) -> Iterator[None]:
        """Append a receipt for an upload that its sender must correct; faults of the receiver say nothing about the file."""
        try:
            yield
        except ClientGone:
            raise
        except (RequestRefused, FileTooLarge) as error:
            self.record_rejection(request, headers, as_refusal(request, error))
            raise

    def record_rejection(self, request: ReceiverRequest, headers: UploadHeaders, refusal: RequestRefused) -> None:
        facts = refusal.facts if isinstance(refusal, FileRejected) else {}
        reason = (refusal.reason or str(refusal))[:1000]
        receipt = make_receipt(request, headers, "rejected", reason=reason, reason_class=refusal.reason_class, **facts)
        [appended] = self.receipts.append([receipt])
        if isinstance(appended, StorageError):
            logger.error("a rejected upload could not be recorded: %s", appended)
        self.report(request, receipt, refusal.status)

    @contextlib.contextmanager
    def receive_body(self, request: ReceiverRequest) -> Iterator[Upload]:
        """Stream the request body, or the part `file` of a multipart form, to a new upload."""
        length, limit = request.content_length or 0, self.settings.max_file_size
        if length > limit + (FORM_OVERHEAD if request.is_form else 0):
            raise FileTooLarge(limit)
        with self.storage.new_upload(min(length, limit)) as upload:
            if request.is_form:
                receive_form(request, upload)
            else:
                while piece := request.body.read(BODY_CHUNK):
                    upload.write(piece)
            if not upload.size:
                reason = "the part `file` is empty" if request.is_form else "the request has no body"
                raise RequestRefused(NO_FILE, "empty", reason=reason)
            yield upload

    def validate(
        self, request: ReceiverRequest, upload: Upload, headers: UploadHeaders
    ) -> tuple[dict[str, rootcheck.RootObject], float]:
        """Return the objects in an upload and the seconds of its validation; raises FileRejected or ClientGone."""
        if headers.sha256 is not None and headers.sha256 != upload.sha256:
            message = f"The header sha256 differs from that of the {upload.size} bytes received, {upload.sha256}"
            raise FileRejected(message, "sha256", upload)
        sender = request.token.name if request.token else ""
        with self.validation_slots[request.is_multiprocess].take(sender), os_errors():
            if is_client_gone(request):
                raise ClientGone
            began = time.monotonic()
            try:
                return rootcheck.check_root_file(upload.fd), round(time.monotonic() - began, 6)
            except rootcheck.InvalidRootFile as error:
                reason = str(error)
            finally:
                seconds = round(time.monotonic() - began, 6)
                self.metrics.observe_validation(seconds)
        if request.mimetype == "application/x-www-form-urlencoded":
            reason += "; `curl -d @file` drops line ends: use `--data-binary @file` or `-F file=@file`"
        if not request.is_check:
            try:
                self.storage.quarantine(upload, headers.file_name)
            except StorageError:
                logger.exception("an invalid upload could not be kept")
        raise FileRejected(NOT_VALID, "invalid_root_file", upload, reason, seconds)

    def report(self, request: ReceiverRequest, receipt: Receipt, status: int = 200) -> None:
        """Count an upload that has a receipt and write its line to the log."""
        self.metrics.count_upload(receipt.agent, receipt.outcome, receipt.size, receipt.seconds)
        reasons = {"reason_class": receipt.reason_class, "reason": receipt.reason} if receipt.reason else {}
        facts = request.facts | {"filename": receipt.filename, "size": receipt.size, "seconds": receipt.seconds}
        log("upload", outcome=receipt.outcome, status=status, **facts, **reasons)
        request.is_logged = True

    # --- files ---------------------------------------------------------------------------------------------------------

    def list_files(self, request: ReceiverRequest) -> Response:
        """GET /rest/api/files: list the accepted files, or send the one named in the query."""
        name = request.parameter("filename")
        if name is not None:
            return self.send(request, name)
        run, agent = request.parameter("runNumber"), request.parameter("amoreAgent")
        wanted_run = None if run is None else check_number("query runNumber", run, storage.MAX_RUN)
        wanted_agent = None if agent is None else check_agent("query amoreAgent", agent).replace("_", "-")
        names = self.storage.file_names(lambda agent, run: wanted_agent in (None, agent) and wanted_run in (None, run))
        limit, before = request.page
        if limit is None:
            return conditional(request, json_response({"files": names}))
        names = [name for name in reversed(names) if before is None or name < before]
        content = {"files": names[:limit], "before": names[limit - 1] if len(names) > limit else None}
        return conditional(request, json_response(content))

    def send(self, request: ReceiverRequest, name: str) -> Response:
        """GET /rest/api/files/<name>: send a file, or the part of it that the request asks for."""
        try:
            file = self.storage.open(name)
        except storage.FileNotStored:
            run, is_known = storage.run_of(name), False
            with contextlib.suppress(RunNotFound):
                is_known = run is not None and self.summaries.has_accepted(run, name)
            if is_known:
                raise storage.FileNotStored(f"The file {name} was received and has since been taken away") from None
            raise
        try:
            return send_file(request, file, name)
        except BaseException:
            file.close()
            raise

    # --- runs and receipts ---------------------------------------------------------------------------------------------

    def list_runs(self, request: ReceiverRequest) -> Response:
        """GET /rest/api/runs: list the runs that have receipts."""
        limit, before = request.page
        content: dict[str, object]
        if limit is None:
            content = {"runs": self.receipts.runs()}
        else:
            runs = self.receipts.recent_runs()
            if before is not None:
                number = check_number("query before", before, storage.MAX_RUN)
                runs = runs[runs.index(number) + 1 :] if number in runs else []
            content = {"runs": runs[:limit], "before": runs[limit - 1] if len(runs) > limit else None}
        response = json_response(content)
        return conditional(request, response)

    def describe_run(self, request: ReceiverRequest, run: str) -> Response:
        """GET /rest/api/runs/<run>: summarize the uploads of a run by agent."""
        number = check_number("run in the path", run, storage.MAX_RUN)
        expected = zlib.crc32(" ".join(self.settings.agents).encode())  # `missing` depends on it
        etag = f"{etag_of(self.receipts, number)}-{expected:x}"
        if response := not_modified(request, etag):
            return response
        agents = self.summaries.agents(number)
        missing = [agent for agent in self.settings.agents if agent not in agents]
        return json_response({"run": number, "agents": agents, "missing": missing}, etag=etag)

    def list_receipts(self, request: ReceiverRequest, run: str | None = None) -> Response:
        """GET /rest/api/receipts, GET /rest/api/runs/<run>/receipts: list the newest receipts."""
        number = None if run is None else check_number("run in the path", run, storage.MAX_RUN)
        limit, before = request.page
        agent, outcome = request.parameter("amoreAgent"), request.parameter("outcome")
        if outcome is not None and outcome not in OUTCOMES:
            raise RequestRefused(f"The query outcome must be one of {', '.join(OUTCOMES)}", "query")
        wanted_agent = None if agent is None else check_agent("query amoreAgent", agent)
        query = Query(limit or 100, before, wanted_agent, outcome)
        etag = etag_of(self.receipts, number)
        if response := not_modified(request, etag):
            return response
        receipts, before = newest(self.receipts, number, query)
        return json_response({"receipts": [receipt.content for receipt in receipts], "before": before}, etag=etag)

    # --- the receiver itself -------------------------------------------------------------------------------------------

    def health(self, request: ReceiverRequest) -> Response:
        """GET /rest/api/health: say whether the folder can be written and has room."""
        try:
            self.storage.check_health()
        except StorageError as error:
            raise RequestRefused(str(error), error.reason_class, status=503) from error
        self.receipts.folder.open(check=True).require_writable()
        return json_response({"status": 200, "message": "The data folder can be written and has room"})

    def show_metrics(self, request: ReceiverRequest) -> Response:
        """GET /metrics: return the metrics for Prometheus."""
        if not self.settings.metrics:
            raise NotFound
        free = math.nan
        with contextlib.suppress(StorageError):  # while the folder fails, the other metrics matter most
            free = self.storage.free_space()
        return Response(self.metrics.render(free), content_type=CONTENT_TYPE_PLAIN_0_0_4)

    def describe_api(self, request: ReceiverRequest) -> Response:
        """GET /rest/api/openapi.json: describe this interface."""
        return Response(installed_path("openapi.json").read_bytes(), mimetype="application/json")

    def show_page(self, request: ReceiverRequest, name: str = "index.html") -> Response:
        """GET /view/: return a file of the page for shifters, or one of JSROOT that it loads."""
        if request.path == "/view":  # the page's own addresses are relative to /view/
            return Response(status=308, headers={"Location": f"{request.script_root}/view/"})
        if name in _PAGE_FILES:
            path = installed_path(f"page/{name}")
        elif name in _JSROOT_FILES and self.settings.jsroot:
            path = self.settings.jsroot / name
        else:
            raise NotFound
        try:
            response = Response(path.read_bytes(), mimetype=_PAGE_TYPES[path.suffix], headers=_PAGE_HEADERS)
        except FileNotFoundError as error:
            raise NotFound from error
        return conditional(request, response)

    def not_implemented(self, request: ReceiverRequest) -> Response:
        """/, with any method: refuse. Senders try their token here."""
        raise RequestRefused("Not implemented", "request")


def is_client_gone(request: ReceiverRequest) -> bool:
    """Return whether the client has closed its connection. Only gunicorn shows the connection; elsewhere this is False."""
    client = request.environ.get("gunicorn.socket")
    if not isinstance(client, socket.socket):
        return False
    poll = select.poll()
    poll.register(client, select.POLLIN)
    try:
        return bool(poll.poll(0)) and not client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def make_receipt(request: ReceiverRequest, headers: UploadHeaders, outcome: str, **facts: Any) -> Receipt:
    return Receipt(
        outcome=outcome,
        filename=headers.file_name,
        run=headers.run,
        time_stamp=headers.time_stamp,
        agent=headers.agent,
        data_status=headers.data_status,
        sender=request.token.name if request.token else "",
        seconds=round(time.monotonic() - request.began, 6),
        **facts,
    )


# --- answers -----------------------------------------------------------------------------------------------------------


def success_content(upload: Upload, objects: Mapping[str, rootcheck.RootObject], name: str) -> dict[str, Any]:
    """Return the answer to a valid file, with at most 1 MiB of JSON about its objects."""
    described = {key: found.description for key, found in objects.items()}
    content: dict[str, Any] = {"status": 200} | ({"filename": name} if name else {})
    content |= {"message": SUCCESS, "received": described, "size": upload.size, "sha256": upload.sha256}
    characters = sum(len(key) + len(text) + 1 for key, text in described.items())
    if 12 * characters > _MAX_RECEIVED:  # JSON needs at most 12 bytes for a character
        sizes = accumulate(len(json.dumps({key: text})) for key, text in described.items())
        fitting = sum(1 for _ in takewhile(lambda size: size <= _MAX_RECEIVED, sizes))
        if fitting < len(described):
            content |= {"received": dict(islice(described.items(), fitting)), "truncated": True}
    return content


def json_response(content: Mapping[str, object], status: int = 200, *, etag: str | None = None) -> Response:
    response = Response(json.dumps(content) + "\n", status, mimetype="application/json")
    if etag:
        response.set_etag(etag)
    return response


def not_modified(request: ReceiverRequest, etag: str) -> Response | None:
    """Return a 304 if the client has the version with this ETag, else None: then the caller makes the content."""
    response = Response(mimetype="application/json")
    response.set_etag(etag)
    return response if conditional(request, response).status_code == 304 else None


def as_refusal(request: ReceiverRequest, error: Exception) -> RequestRefused:
    """Translate an exception into the refusal that is answered, counted and logged."""
    if isinstance(error, RequestRefused):
        return error
    if isinstance(error, StorageError):
        return RequestRefused(str(error), error.reason_class, status=error.status)
    if isinstance(error, MethodNotAllowed):
        works = " or ".join(sorted(set(error.valid_methods or ()) - {"HEAD"}))
        message = f"{request.method} does not work at this address, {works} does"
        return RequestRefused(message, "method", status=405, headers=error.get_headers())
    if isinstance(error, NotFound):
        message = f"There is nothing at this address; {request.script_root}/rest/api/openapi.json describes the API"
        return RequestRefused(message, "not_found", status=404)
    if isinstance(error, HTTPException):
        message = error.description or error.name
        return RequestRefused(message, "request", status=error.code or 500, headers=error.get_headers())
    logger.error("failed to answer %s %s", request.method, json.dumps(request.path), exc_info=error)
    return RequestRefused("The receiver failed; its log has the details", "fault", status=500)


def error_response(refusal: RequestRefused) -> Response:
    content = {"status": refusal.status, "message": str(refusal), "received": None}
    response = json_response(content | ({"reason": refusal.reason} if refusal.reason else {}), refusal.status)
    response.headers.extend((name, value) for name, value in refusal.headers if not name.startswith("Content-Type"))
    return response


def log(event: str, **facts: object) -> None:
    """Write a line of key=value to the log; JSON escapes control characters and everything but ASCII."""
    logger.info(
        "%s %s", event, " ".join(f"{key}={json.dumps(fact)}" for key, fact in facts.items() if fact is not None)
    )


def installed_path(name: str) -> Path:
    """Return the path of a file that the receiver sends: in a checkout, or where setup.cfg installs it."""
    path = Path(__file__).parent / name
    return path if path.exists() else Path(sysconfig.get_path("data"), "share", "dqm-receiver", name)


def create_app(environ: Mapping[str, str] = os.environ) -> Receiver:
    """Return the WSGI application for these settings; raises ConfigurationError, which names the wrong setting."""
    settings = Settings.read(environ)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not logger.hasHandlers():  # the server has set up no logging, so the lines go to standard error
        logger.addHandler(logging.StreamHandler())
    receiver = Receiver(settings)
    log(
        "start",
        version=__version__,
        folder=str(receiver.storage.folder),
        tokens=[token.name for token in settings.tokens],
        agents=list(settings.agents),
        max_file_size=settings.max_file_size,
        min_free_space=settings.min_free_space,
        max_rejected=settings.max_rejected,
    )
    return receiver


if __name__ == "__main__":
    from receiver_command import main

    main()
