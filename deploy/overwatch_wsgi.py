"""Overwatch with the DQM receiver mounted at /dqm: the application that uwsgi.ini serves."""

import logging
import os
import time
from pathlib import Path

# The folder with the metrics of all processes, see uwsgi.ini. prometheus_client reads this variable when it is imported.
os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", "/run/overwatch/metrics")

import uwsgi
from overwatch.webApp.run import app
from prometheus_client import multiprocess
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import receiver

# One line for each upload at any log level of Overwatch, to Overwatch's handlers or to standard error.
logging.basicConfig()
logging.getLogger("dqm_receiver").setLevel(logging.INFO)

# The gauges of a process that ends, such as uploads in progress, must end with it.
uwsgi.atexit = lambda: multiprocess.mark_process_dead(os.getpid())

# This file exists after the first start of a process; uwsgi.ini empties the folder.
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
