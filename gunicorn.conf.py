"""gunicorn's settings for the DQM receiver: in a checkout, plain `gunicorn` serves on 127.0.0.1:8080."""

import os

wsgi_app = "receiver:create_app()"
bind = "127.0.0.1:8080"

# A process per core, as validating takes turns within one; threads, so that slow senders wait for nobody but themselves.
workers = min(os.cpu_count() or 1, 4)
worker_class = "gthread"
threads = 128

# An upload under way is finished before a worker stops (SIGTERM) or is replaced (SIGHUP).
graceful_timeout = 600

# gunicorn's own remote control is not needed, and its socket would lie in a home folder that a service may not have.
control_socket_disable = True
