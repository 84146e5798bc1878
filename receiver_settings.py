"""Settings of the receiver: environment variables `DQM_RECEIVER_…` and the token file."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("dqm_receiver")

PREFIX = "DQM_RECEIVER_"
AGENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
TOKEN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
DEFAULT_SENDER = "default"  # the name of the token in DQM_RECEIVER_TOKEN

_VARIABLES = (
    "DATA_FOLDER", "TOKEN", "TOKENS_FILE", "AGENTS", "MAX_FILE_SIZE", "MIN_FREE_SPACE", "MAX_REJECTED", "METRICS", "JSROOT",
)  # fmt: skip
_SECTIONS = ("tokens", "readers", "agents")

# Kubernetes sets these variables for a service that is named dqm-receiver, some of them to values such as tcp://10.0.0.1:8080.
_KUBERNETES = re.compile(r"SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_[0-9]+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?")
_KUBERNETES_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")


class ConfigurationError(RuntimeError):
    """A setting is missing or wrong; the text names it. It is a RuntimeError, because gunicorn prints those as one line and ends."""


@dataclass(frozen=True)
class Token:
    """A token's SHA-256 digests (several while it is being changed) and its rights."""

    name: str
    digests: tuple[bytes, ...]
    may_send: bool = True
    agents: tuple[str, ...] = ()  # the agents that it may send as; empty: any


@dataclass(frozen=True)
class Settings:
    """The settings from the environment variables; sizes in bytes."""

    data_folder: Path
    tokens: tuple[Token, ...]
    agents: tuple[str, ...]  # the agents that are expected; empty: any
    max_file_size: int
    min_free_space: int  # that uploads leave on the disk
    max_rejected: int  # of invalid uploads that are kept
    metrics: bool  # whether /metrics answers
    jsroot: Path | None  # folder with jsroot.min.js

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings; raises ConfigurationError."""
        _check_names(environ)
        metrics = environ.get(f"{PREFIX}METRICS", "on")
        if metrics not in ("on", "off"):
            raise ConfigurationError(f"{PREFIX}METRICS must be on or off, not {metrics!r}")
        jsroot = environ.get(f"{PREFIX}JSROOT")
        if jsroot and not Path(jsroot, "jsroot.min.js").is_file():
            raise ConfigurationError(f"{PREFIX}JSROOT {jsroot}: the folder has no jsroot.min.js")
        return cls(
            data_folder=Path(environ.get(f"{PREFIX}DATA_FOLDER") or "data"),
            tokens=_read_tokens(environ.get(f"{PREFIX}TOKEN"), environ.get(f"{PREFIX}TOKENS_FILE")),
            agents=_read_agents(f"{PREFIX}AGENTS", environ.get(f"{PREFIX}AGENTS", "")),
            max_file_size=_read_size(environ, "MAX_FILE_SIZE", 2 << 30),
            min_free_space=_read_size(environ, "MIN_FREE_SPACE", 1 << 30),
            max_rejected=_read_size(environ, "MAX_REJECTED", 256 << 20),
            metrics=metrics == "on",
            jsroot=Path(jsroot) if jsroot else None,
        )

    def find_token(self, token: str) -> Token | None:
        """Return the token with this value, or None. All known digests are compared, each in constant time."""
        digest = digest_of(token.encode("latin-1"))  # WSGI decodes the bytes of a header as latin-1
        found = [known for known in self.tokens for one in known.digests if hmac.compare_digest(one, digest)]
        return found[0] if found else None


def digest_of(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _check_names(environ: Mapping[str, str]) -> None:
    for variable, value in environ.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or name in _VARIABLES or _KUBERNETES.fullmatch(name):
            continue
        if name == "PORT" and _KUBERNETES_ADDRESS.fullmatch(value):
            continue
        raise ConfigurationError(
            f"{variable} is not a setting; there are {', '.join(PREFIX + one for one in _VARIABLES)}"
        )


def _read_size(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(PREFIX + name, str(default))
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ConfigurationError(f"{PREFIX}{name} must be a number of bytes, not {text!r}")
    return int(text)


def _read_agents(where: str, text: str) -> tuple[str, ...]:
    for agent in text.split():
        if not AGENT.fullmatch(agent):
            raise ConfigurationError(f"{where}: {agent!r} cannot be an agent: 1 to 64 of A-Z a-z 0-9 - _")
    return tuple(text.split())


# --- tokens ------------------------------------------------------------------------------------------------------------


def _read_tokens(token: str | None, path: str | None) -> tuple[Token, ...]:
    tokens = []
    if token:
        if token != token.strip() or "," in token or not token.isprintable():  # no header carries these unchanged
            raise ConfigurationError(
                f"{PREFIX}TOKEN has a comma, a control character, or a blank at its beginning or end"
            )
        tokens.append(Token(DEFAULT_SENDER, (digest_of(token.encode()),)))
    if path:
        where = f"{PREFIX}TOKENS_FILE {path}"
        try:
            text = Path(path).read_text()
            readable_by_all = os.stat(path).st_mode & stat.S_IROTH
        except OSError as error:
            raise ConfigurationError(f"{where}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise ConfigurationError(f"{where}: it is not a text in UTF-8") from None
        if readable_by_all:
            logger.warning("every account of this host can read the token file %s", path)
        tokens += _read_token_file(where, text)
    names = [one.name for one in tokens]
    if names.count(DEFAULT_SENDER) > 1:
        raise ConfigurationError(f"{PREFIX}TOKENS_FILE: the name {DEFAULT_SENDER} is that of {PREFIX}TOKEN")
    if not tokens:
        raise ConfigurationError(f"{PREFIX}TOKEN or {PREFIX}TOKENS_FILE must be set: senders need a token")
    return tuple(tokens)


class _Line(NamedTuple):
    where: str  # file and line number, for messages
    section: str
    name: str
    value: str


def _read_token_file(where: str, text: str) -> list[Token]:
    lines = list(_parse(where, text))
    agents = {}
    for line in lines:
        if line.section == "agents":
            if not any(other.name == line.name and other.section == "tokens" for other in lines):
                raise ConfigurationError(f"{line.where}: there is no token {line.name} in the section [tokens]")
            agents[line.name] = _read_agents(line.where, line.value)
            if not agents[line.name]:
                raise ConfigurationError(f"{line.where}: {line.name} may send as no agent at all")
    tokens = []
    for line in lines:
        if line.section == "agents":
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}(\s+[0-9a-fA-F]{64})*", line.value):
            # The message does not quote the line: it may hold a token.
            raise ConfigurationError(
                f"{line.where}: it must be `name = SHA-256 of the token`, as 64 hexadecimal digits"
            )
        digests = tuple(bytes.fromhex(one) for one in line.value.split())
        tokens.append(Token(line.name, digests, line.section == "tokens", agents.get(line.name, ())))
    if not tokens:
        raise ConfigurationError(f"{where}: it has no line `name = SHA-256 of the token` in a section [tokens]")
    return tokens


def _parse(where: str, text: str) -> list[_Line]:
    """Return the lines of an INI file. Not configparser: it could not name the number of a wrong line."""
    section, lines = "", list[_Line]()
    for number, line in enumerate(text.splitlines(), 1):
        here, line = f"{where}, line {number}", line.strip()
        if not line or line[0] in "#;":
            continue
        if line[0] == "[":
            section = line.strip("[]").strip()
            if section not in _SECTIONS:
                raise ConfigurationError(f"{here}: a section must be [tokens], [readers] or [agents]")
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        if not section or not equals or not TOKEN_NAME.fullmatch(name):
            raise ConfigurationError(f"{here}: it must be `name = …`, below [tokens], [readers] or [agents]")
        if any(other.name == name and (other.section == "agents") == (section == "agents") for other in lines):
            raise ConfigurationError(f"{here}: {name} stands here twice")
        lines.append(_Line(here, section, name, value))
    return lines
