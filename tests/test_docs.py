"""The documents say what the code does: every reason is explained, and the worked example of a rule runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from gnsfx.passes.rules import RULES

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "passes").rglob("*.py"), *(ROOT / "gnsfx").glob("*.py"), *(ROOT / "gnsfx/noise").glob("*.py")])
REASONS_AT_RUN_TIME = (
    "leaves.py",
    "unmeasured.py",
    "collector.py",
    "coverage.py",
    "backend.py",
    "captured_graph.py",
    "capture.py",
    "eager_code.py",
    "pipeline.py",
    "documents.py",
)
TAKES_A_REASON = ("mixed", "Mixed", "Shared")
ASSIGNED = ("refusal", "reason", "doubt")


def words(text: str) -> str:
    return " ".join(text.split())


def pieces(value: ast.expr | None, constants: dict[str, str]) -> list[str]:
    """A reason as text, {} for what is filled in."""
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(str(p.value) if isinstance(p, ast.Constant) else "{}" for p in parts)]
        case ast.Name(id=name) if name in constants:
            return [constants[name]]
        case ast.IfExp(body=body, orelse=other):
            return pieces(body, constants) + pieces(other, constants)
        case ast.Tuple(elts=parts):
            return [text for part in parts for text in pieces(part, constants)]
    return []


def reasons() -> set[str]:
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    constants = {
        node.targets[0].id: text[0]
        for tree in trees.values()
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (text := pieces(node.value, {}))
    }
    found: set[str] = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=[first, *_]) if (
                    name in TAKES_A_REASON
                ):
                    found.update(pieces(first, constants))
                case ast.Assign(targets=[ast.Attribute(attr=name) | ast.Name(id=name), *_], value=value) if (
                    name in ASSIGNED
                ):
                    found.update(pieces(value, constants))
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    named = [getattr(t, "attr", getattr(t, "id", "")) for t in targets]
                    found.update(
                        t for n, v in zip(named, values, strict=False) if n in ASSIGNED for t in pieces(v, constants)
                    )
                case ast.Return(value=value) if path.name in ("capture.py", "pipeline.py"):
                    found.update(pieces(value, constants))
        if path.name in REASONS_AT_RUN_TIME:
            found.update(
                t
                for n in tree.body
                if isinstance(n, ast.Assign)
                for t in pieces(n.value, {})
                if n.targets[0].id.isupper()
            )  # type: ignore[attr-defined]
    return {words(r) for r in found if " " in r.strip()}


def parts(reason: str) -> list[str]:
    """What stands between the holes, without short pieces."""
    split = [p.strip() for p in re.split(r"\{\w*\}|;", reason)]
    longest = max(map(len, split))
    return [p for p in split if len(p) >= min(24, longest)]


def test_every_reason_is_explained() -> None:
    text = words((ROOT / "docs" / "refused.md").read_text())
    missing = [r for r in sorted(reasons()) if not any(part in text for part in parts(r))]
    assert missing == [], missing
    assert len(reasons()) > 80


def test_the_worked_example_of_a_rule() -> None:
    text = (ROOT / "docs" / "rules.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    space: dict[str, Any] = {"__name__": "rules_md"}
    with patch.dict(RULES):
        exec(compile(code, "docs/rules.md", "exec"), space)
    assert [p.name for p in space["report"].parameters] == ["w", "inner.weight", "inner.bias"]


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
