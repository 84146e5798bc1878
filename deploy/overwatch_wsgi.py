"""Overwatch with the DQM receiver mounted at /dqm: what uwsgi.ini serves."""

import logging
import os
import time
from pathlib import Path

# Where the processes' metrics meet, see uwsgi.ini: prometheus_client looks for it when it is imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", "/run/overwatch/metrics")

import uwsgi
from overwatch.webApp.run import app
from prometheus_client import multiprocess
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import receiver

# One line for each upload, whatever level Overwatch logs at; to Overwatch's handlers, or to standard error.
logging.basicConfig()
logging.getLogger("dqm_receiver").setLevel(logging.INFO)

# What a process that ends says of the present moment is no longer true.
uwsgi.atexit = lambda: multiprocess.mark_process_dead(os.getpid())

# There from the first start of a process on; uwsgi.ini empties the folder.
SERVED = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], "served")


def create_receiver() -> receiver.Receiver:
    """Return the receiver; with a mistake in the token file a reload waits here, and the other processes go on."""
    while True:
        try:
            return receiver.create_app()
        except receiver.ConfigurationError as error:
            if not SERVED.exists():
                raise  # no start with a mistake
            logging.getLogger("dqm_receiver").error("the reload waits until this is mended: %s", error)
            time.sleep(2)


app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/dqm": create_receiver()})
SERVED.touch()
application = app
