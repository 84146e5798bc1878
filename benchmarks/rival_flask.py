"""A receiver as users had it before, for uploads.py: Flask saves the file, CERN ROOT opens it and reads every key.

As it was, it syncs nothing: a power cut can lose files that it acknowledged. With RIVAL_FSYNC=1 it fsyncs the file and the folder before it
answers. A file of the same name is overwritten, and every file that ROOT can read is valid.
"""

from __future__ import annotations

import os
from pathlib import Path

import ROOT
from flask import Flask, request
from flask.typing import ResponseReturnValue

FSYNC = os.environ.get("RIVAL_FSYNC") == "1"

app = Flask(__name__)
folder = Path(os.environ["DQM_RECEIVER_DATA_FOLDER"])
ROOT.gROOT.SetBatch(True)


@app.post("/rest/api/files")
def receive() -> ResponseReturnValue:
    if request.headers.get("token") != os.environ["DQM_RECEIVER_TOKEN"]:
        return {"status": 400, "message": "Received token, but it is invalid!", "received": None}, 400
    agent, run, time_stamp = (request.headers[name] for name in ("amoreAgent", "runNumber", "timeStamp"))
    path = folder / f"{agent}histos_{run}_DQM_{time_stamp}.root"
    request.files["file"].save(path)
    if FSYNC:
        for synced in (path, folder):
            fd = os.open(synced, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    root_file = ROOT.TFile.Open(str(path), "READ")
    if not root_file or root_file.IsZombie():
        return {"status": 400, "message": "The file is not valid!", "received": None}, 400
    received = {}
    for key in root_file.GetListOfKeys():
        obj = key.ReadObj()
        received[key.GetName()] = f"Obj name: {obj.GetName()}, Obj IsA() Name: {obj.IsA().GetName()}"
    root_file.Close()
    return {"status": 200, "filename": path.name, "message": "Successfully received file", "received": received}
