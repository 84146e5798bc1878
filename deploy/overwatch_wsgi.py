"""Overwatch with the DQM receiver mounted at /dqm: what uwsgi.ini serves."""

import logging
import os

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

app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/dqm": receiver.create_app()})
application = app
