"""Overwatch with the DQM receiver mounted at /dqm: what uwsgi.ini serves."""

import logging

from overwatch.webApp.run import app
from werkzeug.middleware.dispatcher import DispatcherMiddleware

import receiver

# One line for each upload, whatever level Overwatch logs at; to Overwatch's handlers, or to standard error.
logging.basicConfig()
logging.getLogger("dqm_receiver").setLevel(logging.INFO)

app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/dqm": receiver.create_app()})
application = app
