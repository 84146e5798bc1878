"""A WSGI application with the receiver below /dqm, for gunicorn with its own settings."""

from __future__ import annotations

from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.wrappers import Response

import receiver

elsewhere = Response("not here", 400)
application = DispatcherMiddleware(elsewhere, {"/dqm": receiver.create_app()})
