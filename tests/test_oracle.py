"""rootcheck and CERN ROOT agree about every file of a folder, but for the differences that oracle.py explains.

DQM_ORACLE_FILES=FOLDER DQM_ORACLE_PYTHON=PYTHON python -m pytest -m slow -n 0 -s tests/test_oracle.py

PYTHON is one that has PyPI's `root`; tests/data/make_corpus.py makes a folder with files of many writers.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from oracle import Report, listed, root_answers

FILES = os.environ.get("DQM_ORACLE_FILES", "")
PYTHON = os.environ.get("DQM_ORACLE_PYTHON", "")
ANSWERS = os.environ.get("DQM_ORACLE_ANSWERS", "")  # a file that keeps what ROOT said


@pytest.mark.slow
@pytest.mark.skipif(not FILES or not PYTHON, reason="DQM_ORACLE_FILES or DQM_ORACLE_PYTHON is not set")
def test_rootcheck_agrees_with_cern_root() -> None:
    folder = Path(FILES)
    report = Report(folder, root_answers(folder, PYTHON, Path(ANSWERS) if ANSWERS else None))
    print(f"\n{report.table()}\n{report.names} names compared")
    assert sum(report.files.values()), f"{folder} holds no ROOT files"
    assert not report.unexplained, f"\n{listed(report.unexplained)}"
