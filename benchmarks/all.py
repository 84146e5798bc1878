"""Runs every benchmark and puts what it prints between its markers in docs/performance.md.

Command: python benchmarks/all.py [NAME ...]   (half an hour; NAME is that of a script, without .py)
Needs: what the benchmarks need.
"""

from __future__ import annotations

import subprocess
import sys

import common

PAGE = common.PROJECT / "docs" / "performance.md"
NAMES = (
    "uploads",
    "upload_profile",
    "slow_disk",
    "validation",
    "hostile",
    "scaling",
    "many_runs",
    "memory",
    "downloads",
)


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        print(name, file=sys.stderr)
        command = [sys.executable, "-W", "ignore", str(common.HERE / f"{name}.py")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        page = PAGE.read_text()
        before, marker, rest = page.partition(f"<!-- {name}.py -->\n")
        end = rest.index("<!-- end -->")
        PAGE.write_text(f"{before}{marker}{output}{rest[end:]}")


if __name__ == "__main__":
    main()
