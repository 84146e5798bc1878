"""The command `dqm-receiver`: it tests the settings, makes tokens and validates ROOT files."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

import receiver
import rootcheck
from durable import StorageError
from receiver_settings import PREFIX, TOKEN_NAME, ConfigurationError, Settings, Token, digest_of


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; exits with 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="dqm-receiver",
        description="The DQM receiver's tools. The receiver itself runs under gunicorn or in Overwatch's server.",
    )
    parser.add_argument("--version", action="version", version=f"dqm-receiver {receiver.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser(
        "check-config",
        help="print the settings, and test the data folder",
        description=f"Prints the settings from the variables {PREFIX}… and tests the data folder. Exits with 1 if one is wrong.",
    )
    token = commands.add_parser(
        "token",
        help="make a token for a sender",
        description="Prints a new token once, and its line for the token file. That file holds only the token's SHA-256.",
    )
    token.add_argument("name", metavar="NAME", help="the sender's name in receipts and logs, such as HLT")
    check = commands.add_parser(
        "check",
        help="validate ROOT files as the receiver does",
        description="Lists the objects of each file, or the reason for which the receiver would refuse it. "
        "Exits with 1 if a file is not valid.",
    )
    check.add_argument("files", metavar="FILE", nargs="+")
    options = parser.parse_args(arguments)
    if options.command == "token":
        sys.exit(make_token(options.name))
    if options.command == "check":
        sys.exit(rootcheck.main(options.files))
    sys.exit(check_config())


def make_token(name: str) -> int | str:
    if not TOKEN_NAME.fullmatch(name):
        return "dqm-receiver: NAME must be 1 to 64 of the characters A-Z, a-z, 0-9, _, . and -"
    token = secrets.token_urlsafe(32)
    print(f"The token of {name}, which is shown only now:\n\n    {token}\n")
    print("The line for the token file, below [tokens] to send and read, or below [readers] to read only:\n")
    print(f"    {name} = {digest_of(token.encode()).hex()}")
    return 0


def check_config() -> int | str:
    try:
        settings = Settings.read(os.environ)
        if os.geteuid() == 0 and settings.data_folder.exists() and (owner := settings.data_folder.stat().st_uid):
            # Root would make hidden folders that belong to root, and the receiver could not use them.
            return f"wrong: {settings.data_folder} belongs to user {owner}: run this as that user, not as root"
        app = receiver.Receiver(settings)
        free = app.storage.free_space()
    except (ConfigurationError, StorageError) as error:
        return f"wrong: {error}"
    print(f"folder: {app.storage.folder} ({file_system_of(app.storage.folder)}), {free} bytes free")
    print(f"limits: files up to {settings.max_file_size} bytes; {settings.min_free_space} bytes of the disk stay free;")
    print(f"        up to {settings.max_rejected} bytes of rejected uploads are kept")
    for token in settings.tokens:
        print(f"token:  {token.name} {rights_of(token)}")
    print(f"agents: {' '.join(settings.agents) or 'any'}")
    print(f"metrics: {'on' if settings.metrics else 'off'}; drawings on the page: {settings.jsroot or 'off'}")
    try:
        app.storage.check_health()
    except StorageError as error:
        return f"wrong: {error}"
    print("The data folder can be written, has locks and has room.")
    return 0


def rights_of(token: Token) -> str:
    if not token.may_send:
        return "may read"
    return f"may read, and send as {' '.join(token.agents) or 'any agent'}"


def file_system_of(folder: Path) -> str:
    """Return the kernel's name for the type of a folder's file system."""
    found = ("", "an unknown file system")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, source = line.partition(" - ")  # proc(5)
        point = fields.split()[4].replace("\\040", " ")
        if folder.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, source.split()[0])
    return found[1]


if __name__ == "__main__":
    main()
