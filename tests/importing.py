"""Import the modules of the receiver, and print what that has done: files made, threads, handlers of the log."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading

before = os.getcwd(), dict(os.environ), sys.stdout, sys.stderr
for name in ("receiver", "receiver_command", "rootcheck", "storage"):
    importlib.import_module(name)
assert (os.getcwd(), dict(os.environ), sys.stdout, sys.stderr) == before
print(os.listdir("."), threading.active_count(), logging.root.handlers, logging.getLogger("dqm_receiver").handlers)
