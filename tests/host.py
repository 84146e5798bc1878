"""A host application with its own wishes for the log, in which a receiver takes a file: host.py nothing|format|warnings FOLDER"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from client import send, settings
from werkzeug.test import Client

import receiver

wanted, folder = sys.argv[1:]
if wanted == "a format":
    logging.basicConfig(format="%(levelname)s|%(message)s", stream=sys.stdout)
elif wanted == "warnings":
    logging.getLogger("dqm_receiver").setLevel(logging.WARNING)
send(Client(receiver.create_app(settings(Path(folder)))))
