"""The house: where things are imported from, what a wheel holds, and what ``import gnsfx`` costs."""

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_layering import PLAN, SOURCES

ROOT = Path(__file__).resolve().parents[1]


def fresh(program, cwd):
    """Run a program in a new interpreter; what it prints as JSON."""
    command = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


LOADED = """
import json, sys
import gnsfx
files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
print(json.dumps({name: file for name, file in files.items() if file.startswith(%r)}))
"""


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_our_modules_have_one_name_each(cwd, tmp_path):
    loaded = fresh(LOADED % str(ROOT), ROOT if cwd == "root" else tmp_path)
    ours = {name: file for name, file in loaded.items() if ".venv" not in file}
    assert ours and all(name.partition(".")[0] == "gnsfx" for name in ours)


WITHOUT_TRITON = """
import importlib, json, sys
sys.modules["triton"] = None  # importing it raises ImportError
for name in %r:
    importlib.import_module(name)
import torch, gnsfx
from gnsfx.kernels import gpu
assert gpu.kernels_on(torch.device("cuda")) == frozenset()
model = torch.nn.Sequential(torch.nn.Embedding(7, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
compiled = torch.compile(model, backend="gns", options={"gns.inner": "eager", "gns.per_example": True})
compiled(torch.arange(6).view(3, 2)).square().mean((1, 2)).mean().backward()
norms = gnsfx.per_example_sq_norms(model)
print(json.dumps({name: [len(found), bool((found > 0).all())] for name, found in norms.items()}))
"""


def test_triton_is_not_needed(tmp_path):
    """By any module but those in its language, nor for a measured step."""
    names = [name for name in SOURCES if not name.startswith("gnsfx.kernels.triton.") or name == PLAN]
    assert fresh(WITHOUT_TRITON % names, tmp_path) == {
        name: [3, True] for name in ("0.weight", "1.weight", "1.bias", "2.weight", "2.bias")
    }


def test_import_is_quick(tmp_path):
    """On top of torch and its compiler, which a caller of torch.compile imports anyway."""
    program = """
import json, time
import torch, torch._inductor.compile_fx, torch._dynamo.backends.common
start = time.perf_counter()
import gnsfx
print(json.dumps(time.perf_counter() - start))
"""
    assert fresh(program, tmp_path) < 2


def test_public_names(tmp_path):
    program = "import json, gnsfx; print(json.dumps({n: type(getattr(gnsfx, n)).__name__ for n in gnsfx.__all__}))"
    kinds = fresh(program, tmp_path)
    assert kinds == {
        "BatchSizeController": "ABCMeta",
        "BatchSizeSchedule": "ABCMeta",
        "GnsError": "type",
        "IndependenceCheck": "type",
        "NoiseScale": "type",
        "RankDifference": "type",
        "RunLog": "type",
        "__version__": "str",
        "compile": "function",
        "coverage": "function",
        "elementwise_sq_sums": "function",
        "explain": "function",
        "mark_batch": "function",
        "measuring": kinds["measuring"],  # a function or a context manager class
        "per_example_sq_norms": "function",
        "read_log": "function",
        "register_rule": "function",
        "sq_norms": "function",
        "verify": "function",
    }
    assert len((ROOT / "gnsfx/__init__.py").read_text().splitlines()) < 50


def test_torch_finds_the_backend():
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="gns")
    assert entry.value == "gnsfx.backend:gns"


@pytest.mark.parametrize("room", ["passes", "kernels"])
def test_rooms_are_linked_and_no_packages_of_their_own(room):
    link = ROOT / "gnsfx" / room
    assert link.is_symlink() and str(link.readlink()) == f"../{room}"
    assert not (ROOT / room / "__init__.py").exists(), "a root package would shadow other people's"


def test_wheel_holds_only_gnsfx(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"gnsfx"}
    held = {name.removeprefix("gnsfx/") for name in names}
    for folder, kinds in {"passes": ["py"], "kernels": ["py", "cpp", "h"], "kernels/triton": ["py"]}.items():
        for kind in kinds:
            files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(f"*.{kind}")}
            assert files and files <= held, kind
    assert "gnsfx/py.typed" in names


def test_readme_shows_code_first():
    head = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:10])
    assert "```python" in head and 'backend="gns"' in head


def test_versions_agree():
    (released, *_) = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert f'__version__ = "{released}"' in (ROOT / "gnsfx/__init__.py").read_text(encoding="utf-8")
