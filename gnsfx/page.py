"""An explanation as one self-contained page: table, operations, and for each graph the difference, before and after."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gnsfx.coverage import format_shape

if TYPE_CHECKING:
    from gnsfx.explanation import Explanation

HEADER = (
    "parameter",
    "shape",
    "rank",
    "operation",
    "path",
    "FLOPs",
    "bytes",
    "memory",
    "time",
    "of plain",
    "bound by",
    "why",
)
NUMBERS = (2, 5, 6, 7, 8, 9)
LEGEND = (
    "* the path taken. Each path includes the gradient itself; `plain` is that gradient without norms. memory: what a path allocates beyond it. "
    "time: modelled, not measured, and what most of it goes into: flops, bytes moved, calls of operations, or memory mapped anew."
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 100rem; padding: 0 1rem; color: #1b1f24; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid #e3e6ea; vertical-align: top; white-space: nowrap; }
td.wrap { white-space: normal; min-width: 20rem; }
td.number, th.number { text-align: right; }
tr.taken td.path { font-weight: 600; }
tr.refused td { background: #fff3f0; }
pre { overflow-x: auto; padding: .8rem; background: #f6f8fa; font-size: 12px; line-height: 1.4; }
pre .add { background: #dafbe1; display: block; } pre .del { background: #ffebe9; display: block; } pre .hunk { color: #57606a; display: block; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e8eb; background: #14171a; } th, td { border-color: #33383e; } pre { background: #1d2125; }
  tr.refused td { background: #3a1e1a; } pre .add { background: #12361f; } pre .del { background: #45191a; } pre .hunk { color: #9aa4ae; }
}
"""


def page(explanation: Explanation) -> str:
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>gnsfx: how the model is measured</title><style>{_STYLE}</style></head><body>",
        f"<h1>How the model is measured</h1><p>{html.escape(LEGEND)}</p>",
        _html_table(explanation),
        f"<h2>Operations</h2><pre>{html.escape(explanation.summary)}</pre>",
    ]
    for i, graph in enumerate(explanation.graphs, 1):
        parts.append(f"<h2>Graph {i} of {len(explanation.graphs)}: {html.escape(graph.plan)}</h2>")
        parts.append(f"<details open><summary>Difference</summary><pre>{_html_diff(graph.diff)}</pre></details>")
        for title, text in (("Before", graph.before), ("After", graph.after)):
            parts.append(f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join([*parts, "</body></html>", ""])


def _html_table(explanation: Explanation) -> str:
    rows = [_html_row(HEADER, "th")]
    for graph in explanation.graphs:
        for explained in graph.parameters:
            notes: _Whole = _Whole()
            for cells in explained.lines(notes):
                kind = (
                    "refused" if explained.record.status == "refused" else "taken" if cells[4].startswith("*") else ""
                )
                rows.append(_html_row(cells, "td", kind))
    for row in explanation.others:
        cells = (row.name, format_shape(row.shape), str(len(row.shape)), "", row.status, *[""] * 6, row.reason)
        rows.append(_html_row(cells, "td"))
    return f"<table>{''.join(rows)}</table>"


class _Whole(dict[str, str]):
    """Footnotes of a table whose cells wrap: none."""

    def setdefault(self, key: str, default: str = "") -> str:  # type: ignore[override]
        return key


def _html_row(cells: Sequence[str], tag: str, kind: str = "") -> str:
    classes = dict.fromkeys(NUMBERS, "number") | {4: "path", 11: "wrap"}
    inner = "".join(f"<{tag} class='{classes.get(i, '')}'>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells))
    return f"<tr class='{kind}'>{inner}</tr>"


def _html_diff(diff: str) -> str:
    return "".join(_html_diff_lines(diff.splitlines()))


def _html_diff_lines(lines: Iterable[str]) -> Iterator[str]:
    kinds = {"+": "add", "-": "del", "@": "hunk"}
    for line in lines:
        kind = "hunk" if line.startswith(("+++", "---")) else kinds.get(line[:1], "")
        text = html.escape(line)
        yield f"<span class='{kind}'>{text}</span>" if kind else f"{text}\n"
