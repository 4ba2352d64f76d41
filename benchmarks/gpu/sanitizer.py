"""compute-sanitizer over the tiny cases of the correctness section: memory errors, then races."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from benchmarks.gpu.bench import Bench, Cases, Row

TOOLS = ("memcheck", "racecheck")
PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
SECONDS = 220  # of a tool
FOUND = 99  # the exit status that stands for errors of the tool's

COLUMNS: tuple[common.Column, ...] = (
    ("tool", lambda row: row["case"]),
    ("found", lambda row: str(row.get("summary", row.get("failed", "")))),
    ("cases", lambda row: str(row.get("cases", ""))),
)


def cases(bench: Bench) -> Cases:
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if tool is None:
        raise RuntimeError("compute-sanitizer is not on this machine: it comes with the CUDA toolkit")
    for name in TOOLS:
        yield name, partial(check, tool, name)


def check(tool: str, name: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        program = ["-m", "benchmarks.gpu", "--sections", "correctness", "--quick", "--rows", str(rows)]
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            str(FOUND),
            "--print-limit",
            "20",
            sys.executable,
            *program,
        ]
        # every tensor its own allocation: what lies behind one is nobody's
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            ended = subprocess.run(
                [*command, "--seconds", str(SECONDS)],
                env=environment,
                timeout=SECONDS + 10,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.TimeoutExpired as late:
            output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
            return {"right": False, "failed": f"not done after {SECONDS} s", "output": output[-4000:]}
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    done = [row for row in found if "end" not in row]
    right = ended.returncode == 0 and bool(done) and all(row["right"] for row in done)
    return {"right": right, "summary": summary(ended.stdout), "cases": len(done), "output": ended.stdout[-4000:]}


def summary(output: str) -> str:
    """The tool's last word, or what came in its place."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
    return found[-1].strip() if found else "no summary: " + " ".join(output.split()[-20:])
