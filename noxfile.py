"""`nox` runs the tests on every supported Python, with the lowest supported versions of the dependencies, and the wheel's."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ("3.11", "3.12", "3.13")


def lowest() -> list[str]:
    """Return what setup.cfg requires, each in the lowest version that it allows."""
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(Path(__file__).with_name("setup.cfg"))
    required = setup["options"]["install_requires"].split("\n")
    return [re.sub(r"\s*>=\s*([^,]*).*", r"==\1", line) for line in required if ">=" in line]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python=PYTHONS[0])
def lowest_versions(session: nox.Session) -> None:
    """Run the tests with the lowest versions of the dependencies, on the lowest Python."""
    session.install(".[test]", *lowest())
    session.run("pytest", *session.posargs)


@nox.session(python=(PYTHONS[0], PYTHONS[-1]))
def wheel(session: nox.Session) -> None:
    """Install the wheel in an empty environment and send it a file."""
    session.install(".[test]")
    session.run("pytest", "-m", "slow or not slow", "tests/test_wheel.py", *session.posargs)
