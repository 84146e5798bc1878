"""gunicorn's settings for the DQM receiver: in a checkout, plain `gunicorn` serves on 127.0.0.1:8080."""

import contextlib
import ctypes
import encodings.idna  # noqa: F401  Werkzeug loads it later, when the user of --user may not be able to read Python's folder
import gc
import logging
import os
import resource
from typing import Any

import gunicorn_worker

# prometheus_client reads this variable when the application imports it.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = gunicorn_worker.metrics_folder()

wsgi_app = "receiver:create_app()"
worker_class = "gunicorn_worker.UploadWorker"
bind = "127.0.0.1:8080"

# A process for each core, because validation holds the interpreter lock most of the time. A thread serves a request from its
# complete head to its answer. All other connections wait in the worker's event loop.
workers = min(len(os.sched_getaffinity(0)), 4)
threads = 128
worker_connections = 8192

# A worker that stops (SIGTERM) or is replaced (SIGHUP) finishes its uploads first.
graceful_timeout = 600

# A head has at most 64 KiB (gunicorn_worker.MAX_HEAD) and 64 fields of 8190 bytes. By default nginx passes on fields of 8 KiB,
# cookies included, and 32 KiB in all.
limit_request_fields = 64
limit_request_field_size = 8190

# Only the header that nginx sets: by default, gunicorn answers 400 if a client sends X-Forwarded-Ssl or -Protocol beside it.
secure_scheme_headers = {"X-FORWARDED-PROTO": "https"}

# The application is loaded before the workers fork, so a mistake in the settings is one line and not a loop of dying workers.
preload_app = True

# gunicorn's remote control is not needed, and a service may not have the home folder in which its socket would lie.
control_socket_disable = True

# The file of the workers' heartbeat is in memory, because a disk that hangs would end the workers.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# A login shell's usual limit, 1024, is too low for the connections and the files of uploads.
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))

# glibc returns large pieces of memory to the kernel and gets the next ones page by page, which costs processor time. So pieces up
# to the largest block of a ROOT file (16 MiB) come from one heap for all threads, whose free end is returned from 40 MiB on.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
with contextlib.suppress(AttributeError):  # another C library
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)
    mallopt(M_MMAP_THRESHOLD, 20 << 20)
    mallopt(M_TRIM_THRESHOLD, 40 << 20)


def when_ready(server: Any) -> None:
    """Before the first worker forks: set up the log, the metrics' folder and the signals."""
    log = logging.getLogger("dqm_receiver")
    log.handlers = server.log.error_log.handlers
    log.setLevel(logging.INFO)
    if os.geteuid() == 0:  # gunicorn --user
        os.chown(os.environ["PROMETHEUS_MULTIPROC_DIR"], server.cfg.uid, server.cfg.gid)
    gunicorn_worker.keep_signals_for_workers()


def on_reload(server: Any) -> None:
    """On SIGHUP: read the token file again, or keep the old tokens if it has a mistake."""
    import receiver
    from durable import StorageError

    try:
        # Without this check, the new application would make the folder while its disk is not mounted.
        server.app.callable.storage.check_folder()
        server.app.callable = receiver.create_app()
        gc.collect()  # closes the descriptors of the old application, whose parts refer to each other
    except (receiver.ConfigurationError, StorageError, OSError) as error:
        server.log.error("the tokens stay as they were: %s", error)


def post_worker_init(worker: Any) -> None:
    """In a worker, before its first request: recover the uploads of a worker that died, and check the folder."""
    from durable import StorageError

    storage = worker.app.callable.storage
    storage.recover()
    try:
        storage.check_health()
    except StorageError as error:  # as with `--user`, where root has made the folder
        worker.log.error("user %s cannot take uploads: %s", os.geteuid(), error)


def child_exit(server: Any, worker: Any) -> None:
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]
