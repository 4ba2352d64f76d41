"""Machine constants: what is read from the cache, and what is ignored with a notice."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from gnsfx.errors import GnsWarning
from gnsfx.kernels import gpu, native
from gnsfx.kernels import machine as module
from gnsfx.kernels.machine import (
    CUDA_KERNELS,
    MACHINES,
    Machine,
    cache_file,
    default,
    fingerprint,
    in_force,
    machine_for,
    write,
)

MINE = replace(MACHINES["cpu"], flops_fp32=123e9)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, real_read):
    monkeypatch.setenv("GNSFX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "read", real_read)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "processor", lambda: "avx512f avx512_bf16")
    machine_for.cache_clear()
    yield
    machine_for.cache_clear()


def quiet(device_type: str) -> Machine:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return machine_for(device_type)


def test_without_a_file_the_shipped_constants_are_used_silently():
    assert quiet("cpu") == MACHINES["cpu"] and quiet("cuda") == MACHINES["cuda"]
    assert quiet("meta") == default("anything") == MACHINES["cuda"]


def test_what_was_written_is_read_and_kept_for_the_process():
    path = write(MINE, "cpu")
    assert quiet("cpu") == MINE and quiet("cuda") == MACHINES["cuda"]
    path.unlink()
    assert quiet("cpu") == MINE  # once per process: graphs of one run are rewritten alike
    machine_for.cache_clear()
    assert quiet("cpu") == MACHINES["cpu"]


def test_the_compile_caches_depend_on_the_constants():
    before = in_force()
    write(MINE, "cpu")
    assert in_force() != before and hash(before) != hash(in_force())


def test_the_compile_caches_depend_on_the_cuda_kernels(monkeypatch):
    """And on the multiprocessors that the choice between their tiles is made for."""
    keys = []
    for names, count in ((), 132), (("products",), 132), (("products",), 78), (("norm", "products"), 78):
        monkeypatch.setattr(gpu, "kernels_on", lambda device, names=names: frozenset(names))
        monkeypatch.setattr(gpu, "multiprocessors", lambda device, count=count: count)
        keys.append(in_force())
    assert len(set(keys)) == 4 and all(hash(key) for key in keys)


def test_the_key_does_not_wake_a_gpu(monkeypatch):
    """A process that compiles for its CPU alone makes no CUDA context."""
    asked = []
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert in_force()[1][2:] == ((), 0) and not asked


def test_a_file_from_before_the_cuda_kernels_has_the_shipped_constants_of_them():
    path = write(replace(MACHINES["cuda"], bandwidth=1e12), "cuda")
    found = json.loads(path.read_text(encoding="utf-8"))
    found["constants"] = {n: c for n, c in found["constants"].items() if n not in CUDA_KERNELS}
    path.write_text(json.dumps(found), encoding="utf-8")
    assert quiet("cuda") == replace(MACHINES["cuda"], bandwidth=1e12)


def test_without_a_compiler_there_is_no_kernel_of_ours(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert machine_for("cpu").fused(torch.float32) == machine_for("cpu").fused(torch.bfloat16) == 0


@pytest.mark.parametrize("features", ("avx512f", "avx512f avx512_bf16 amx_bf16"))
def test_bf16_has_a_kernel_only_where_it_is_the_quickest(monkeypatch, features):
    monkeypatch.setattr(native, "processor", lambda: features)
    rates = machine_for("cpu")
    assert rates.fused(torch.bfloat16) == 0 and rates.fused(torch.float16) == rates.fused(torch.float32) > 0


def test_threads_have_files_of_their_own():
    threads = torch.get_num_threads()
    assert cache_file("cpu").name == f"cpu-{threads}.json" and cache_file("cuda").name == "cuda.json"


def good() -> dict:
    return {"format": module.FORMAT, "of": fingerprint("cpu"), "constants": asdict(MINE)}


def changed(**entries) -> str:
    return json.dumps({**good(), **entries})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        (b"\xff\xfe", "cannot be read"),
        (changed()[:200], "damaged"),
        (changed(constants={}), "damaged"),
        (changed(constants={**asdict(MINE), "speed": 1.0}), "damaged"),
        (changed(constants={**asdict(MINE), "flops_fp32": -1.0}), "no positive number"),
        (changed(constants={**asdict(MINE), "bandwidth": 0}), "no positive number"),
        (changed(constants={**asdict(MINE), "calls": float("nan")}), "no positive number"),
        (changed(constants={**asdict(MINE), "calls": "fast"}), "no positive number"),
        (changed(constants={**asdict(MINE), "measured": 1.0}), "no positive number"),
        (changed(format=0), "format 0, expected"),
        (changed(of=None), "another machine"),
        (changed(of={**fingerprint("cpu"), "processor": "abacus"}), "another machine (processor: 'abacus'"),
        (changed(of={**fingerprint("cpu"), "torch": "1.0"}), "another machine (torch: '1.0'"),
    ],
)
def test_a_useless_file_is_ignored_with_a_notice(text, why):
    path = cache_file("cpu")
    path.parent.mkdir(parents=True)
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text, encoding="utf-8")
    with pytest.warns(GnsWarning) as caught:
        assert machine_for("cpu") == MACHINES["cpu"]
    message = str(caught[0].message)
    assert why in message and str(path) in message and "python -m gnsfx.calibrate --device cpu" in message
    quiet("cpu")  # said once


def test_a_folder_in_the_place_of_the_file():
    cache_file("cpu").mkdir(parents=True)
    with pytest.warns(GnsWarning, match="cannot be read"):
        assert machine_for("cpu") == MACHINES["cpu"]


def test_writing_leaves_no_parts(tmp_path):
    write(MINE, "cpu")
    write(replace(MINE, calls=1e5), "cpu")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [cache_file("cpu").name]
    assert quiet("cpu").calls == 1e5
