"""What was found, for people: what is wrong first, then a table per section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks import common
from benchmarks.gpu.sections import ALL

MANY = 40
"""Rows of a table that are worth showing: those that are wrong, and those nearest to it."""


def troubles(result: Mapping[str, Any]) -> Iterator[str]:
    """All that is wrong, failed or was left out, a line each."""
    for name, section in result["sections"].items():
        if not ALL[name].judged:
            continue
        for row in section["rows"]:
            if not row["right"]:
                yield f"{name}: {row['case']}: {row.get('failed') or _what(row)}"
        if section["error"]:
            yield f"{name}: {section['error']}"


def _what(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("case", "right", "times"))[:300]


def summary(result: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {len(section['rows'])}" for name, section in result["sections"].items())
    return "\n".join([f"cases: {counts}", *(list(troubles(result)) or ["all is right"])])


def text(result: Mapping[str, Any]) -> str:
    blocks = []
    for name, section in result["sections"].items():
        rows, rest = shown(section["rows"])
        table = common.text_table(ALL[name].module.COLUMNS, rows) if rows else ""
        blocks.append("\n".join([ALL[name].title, table, *rest]))
    if result.get("constants"):
        blocks.append(_constants(result["constants"]))
    return "\n\n".join([*blocks, summary(result)])


def markdown(result: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    lines = ["# On a GPU", "", machine, "", *(f"- {line}" for line in list(troubles(result)) or ["all is right"])]
    for name, section in result["sections"].items():
        rows, rest = shown(section["rows"])
        about = (ALL[name].module.__doc__ or "").strip()
        lines += ["", f"## {ALL[name].title}", "", "```", about, "```", ""]
        lines += [common.markdown_table(ALL[name].module.COLUMNS, rows)] if rows else []
        lines += ["", *rest, *(f"- {warning}" for warning in section["warnings"])]
    if result.get("constants"):
        lines += ["", "## Constants", "", "```", _constants(result["constants"]), "```"]
    return "\n".join(lines)


def shown(rows: list[Any]) -> tuple[list[Any], list[str]]:
    """All of a short table; of a long one the worst rows, and a line about the others."""
    rows = [row for row in rows if "machine" not in row]
    if len(rows) <= MANY:
        return rows, []
    worst = sorted(rows, key=lambda row: (row["right"], -(row.get("error") or 0) / row.get("allowed", 1)))
    return worst[:MANY], [f"and {len(rows) - MANY} more, all right, nearer to the truth"]


def _constants(constants: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"{'of kernels/machine.py':24}{'shipped':>12}{'here':>12}"]
    return "\n".join(lines + [f"{name:24}{v['shipped']:12.3g}{v['here']:12.3g}" for name, v in constants.items()])
