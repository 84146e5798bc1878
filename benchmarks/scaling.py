"""Uploads a second, latency and processor time with more and more connections and workers, as a table and a picture (SVG).

Command: python benchmarks/scaling.py [--rounds 3] [--seconds 4] [--folder FOLDER]
Needs: wrk, PyPI's `root`.

A file of 100 TH1F is uploaded as by uploads.py. The load generator runs on the same processors. The picture is docs/scaling.svg.
"""

from __future__ import annotations

import os
from statistics import median

import common

CONNECTIONS = (1, 4, 16, 64, 256)
WORKERS = (1, 2, 4)
COLOURS = ("#1b6ca8", "#c2571a", "#3a7d44")
WIDTH, HEIGHT, MARGIN = 420, 260, 60  # pixels of a chart

Figures = dict[tuple[int, int], common.Load]  # by workers and connections


def chart(figures: Figures, title: str, field: str, scale: float, left: int) -> str:
    """Return a chart of one figure over the connections, a line for each number of workers."""
    top = max(getattr(load, field) * scale for load in figures.values()) * 1.1
    step, floor = (WIDTH - 2 * MARGIN) / (len(CONNECTIONS) - 1), HEIGHT - MARGIN
    parts = [f'<g transform="translate({left},0)"><text x="{MARGIN}" y="24" font-weight="bold">{title}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = floor - share * (HEIGHT - 2 * MARGIN)
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.0f}" y2="{y:.0f}" stroke="#ccc"/>')
        parts.append(f'<text x="{MARGIN - 8}" y="{y + 4:.0f}" text-anchor="end">{share * top:.0f}</text>')
    for index, connections in enumerate(CONNECTIONS):
        parts.append(
            f'<text x="{MARGIN + index * step:.0f}" y="{floor + 18}" text-anchor="middle">{connections}</text>'
        )
    for workers, colour in zip(WORKERS, COLOURS, strict=True):
        heights = [getattr(figures[workers, number], field) * scale / top for number in CONNECTIONS]
        points = [
            f"{MARGIN + index * step:.0f},{floor - height * (HEIGHT - 2 * MARGIN):.0f}"
            for index, height in enumerate(heights)
        ]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return "".join([*parts, "</g>"])


def picture(figures: Figures) -> str:
    charts = (("uploads a second", "per_second", 1.0), ("p50, ms", "median", 1e3), ("p99, ms", "slowest", 1e3))
    width = WIDTH * len(charts)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT + 20}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{HEIGHT + 20}" fill="white"/>',
        *(chart(figures, *one, left=index * WIDTH) for index, one in enumerate(charts)),
    ]
    for index, (workers, colour) in enumerate(zip(WORKERS, COLOURS, strict=True)):
        label = "1 worker" if workers == 1 else f"{workers} workers"
        parts.append(f'<text x="{MARGIN + index * 90}" y="{HEIGHT + 8}" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{MARGIN + 300}" y="{HEIGHT + 8}">over the number of connections</text></svg>\n')
    return "\n".join(parts)


def main() -> None:
    options = common.options(__doc__, rounds=3, seconds=4)
    path = common.file(options.folder, "h100")
    runs: dict[tuple[int, int], list[common.Load]] = {}
    for _ in range(options.rounds):
        for workers in WORKERS:
            with common.server(options.folder, "receiver", workers) as server:
                for connections in CONNECTIONS:
                    result = common.uploads(server, "receiver", path, options.seconds, connections)
                    runs.setdefault((workers, connections), []).append(result)
    figures = {key: common.Load(*map(median, zip(*loads, strict=True))) for key, loads in runs.items()}
    rows = []
    for workers in WORKERS:
        row = ["1 worker" if workers == 1 else f"{workers} workers"]
        for connections in CONNECTIONS:
            load = figures[workers, connections]
            row.append(
                f"{load.per_second:.0f}/s, {load.median * 1e3:.0f} / {load.slowest * 1e3:.0f} ms, {load.cpu * 1e3:.1f} ms"
            )
        rows.append(row)
    head = [f"{connections} connection{'s' * (connections > 1)}" for connections in CONNECTIONS]
    print(common.table([f"on {len(os.sched_getaffinity(0))} processors", *head], rows), "\n")
    print("Each: uploads a second, p50 / p99 of latency, processor time of an upload.")
    print(f"Uploads that failed: {sum(run.errors for one in runs.values() for run in one)}.")
    common.PROJECT.joinpath("docs", "scaling.svg").write_text(picture(figures))


if __name__ == "__main__":
    main()
