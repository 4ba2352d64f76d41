"""Planted mistakes: each changes a line of a kernel, and a test of this folder must then fail."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from gnsfx.kernels.triton import embedding_norm, mm_norm, norm_backward
from tests.triton.interpreted import lookups, products, rows

f32 = rows.DTYPES[0]


class Mistake(NamedTuple):
    """``old`` occurs in the module; its first place is changed. ``test`` notices."""

    name: str
    module: ModuleType
    old: str
    new: str
    test: Callable[[], object]


@contextmanager
def planted(mistake: Mistake, folder: Path) -> Iterator[None]:
    """Tests reach kernels through the names of the module: those of a changed copy stand there meanwhile."""
    source = inspect.getsource(mistake.module)
    assert mistake.old in source, f"{mistake.name}: {mistake.old!r} is not in {mistake.module.__name__}"
    file = folder / "changed.py"
    file.write_text(source.replace(mistake.old, mistake.new, 1), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed", file)
    assert spec and spec.loader
    changed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    right = dict(vars(mistake.module))
    vars(mistake.module).update({k: v for k, v in vars(changed).items() if not k.startswith("__")})
    try:
        yield
    finally:
        vars(mistake.module).update(right)


def regime(name: str, rms: bool = False) -> Callable[[], object]:
    return lambda: rows.test_every_regime(name, f32, rms)


def multiply(n: int = 0, multiprocessors: int = 1) -> Callable[[], object]:
    return lambda: products.test_products(products.SHAPES[n], f32, multiprocessors)


def look() -> None:
    lookups.test_shapes(lookups.SHAPES[0], f32)


COINCIDE = "flat, boundaries that coincide"
MISTAKES = [
    Mistake(
        "rows of the next piece are read",
        norm_backward,
        "mask = inside[:, None] & in_row[None, :]",
        "mask = (rows < T)[:, None] & in_row[None, :]",
        regime("chunk"),
    ),
    Mistake(
        "examples of a program share a slot",
        norm_backward,
        "slot = tl.cast(p + b, tl.int64) * D",
        "slot = tl.cast(p, tl.int64) * D",
        regime("flat"),
    ),
    Mistake(
        "slots are read from where none was written",
        norm_backward,
        "stop = ((b + 1) * T - 1) // R + b + 1",
        "stop = tl.minimum((b + 1) * T // R + b + 1, SLOTS)",
        regime(COINCIDE),
    ),
    Mistake(
        "the first slot of an example is that of the one before",
        norm_backward,
        "first = b * T // R + b",
        "first = b * T // R",
        regime("flat"),
    ),
    Mistake(
        "the total is squared and not the example",
        norm_backward,
        "tl.sum(part * part)",
        "tl.sum(total_sum * total_sum)",
        regime("chunk"),
    ),
    Mistake(
        "the total of a program is squared",
        norm_backward,
        "tl.sum(gamma * gamma)",
        "tl.sum(gamma_total * gamma_total)",
        regime("whole", True),
    ),
    Mistake(
        "a mean over the block and not the row",
        norm_backward,
        "tl.sum(wg * xhat, axis=1) / D",
        "tl.sum(wg * xhat, axis=1) / BLOCK_D",
        regime("chunk", True),
    ),
    Mistake("the mean of the gradient stays", norm_backward, " - (level / D)[:, None]", "", regime("chunk")),
    Mistake(
        "strides of one factor for the other",
        norm_backward,
        "g += example * g_b",
        "g += example * x_b",
        lambda: rows.test_any_strides("positions first", True),
    ),
    Mistake(
        "what is added has the strides of the other factor",
        norm_backward,
        "r += example * r_b",
        "r += example * x_b",
        lambda: rows.test_any_strides("positions first", True),
    ),
    Mistake(
        "the last gradient is read in place of the one before",
        norm_backward,
        "tl.load(g2 + rows",
        "tl.load(g3 + rows",
        lambda: rows.test_a_sum_of_gradients("chunk", 3, "contiguous", True),
    ),
    Mistake(
        "gradients lie in different ways",
        norm_backward,
        "alike = len({g.stride() for g in gradients}) == 1",
        "alike = True",
        lambda: rows.test_a_sum_of_gradients("chunk", 2, "otherwise", True),
    ),
    Mistake("what is added is scaled", norm_backward, "        out *= scale[:, None]\n", "", regime("chunk", True)),
    Mistake(
        "norms of all tiles but the last example's are one sum",
        mm_norm,
        "acc = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)\n        for t",
        "acc = total\n        for t",
        multiply(),
    ),
    Mistake("examples are not added", mm_norm, "total += acc\n    rows", "total = acc\n    rows", multiply()),
    Mistake(
        "the last tile of a band is that of a full one",
        mm_norm,
        "% (GROUP * across) % height",
        "% (GROUP * across) % GROUP",
        multiply(5),
    ),
    Mistake("the last column is not written", mm_norm, "(cols < O)[None, :]", "(cols < O - 1)[None, :]", multiply()),
    Mistake(
        "the last example of a run is left out",
        mm_norm,
        "tl.minimum(first + PER, B)",
        "tl.minimum(first + PER - (z > 0), B)",
        multiply(2, 8),
    ),
    Mistake(
        "pairs of blocks count once",
        mm_norm,
        "tl.where(i == j, 1.0, 2.0)",
        "1.0",
        lambda: products.test_grams(products.SHAPES[0], f32),
    ),
    Mistake(
        "the second factor has the columns of the first",
        mm_norm,
        "_gram_block(g1, b, i, j, O1,",
        "_gram_block(g1, b, i, j, 16,",
        lambda: products.test_grams_of_several_factors(2),
    ),
    Mistake("a run ends where its piece does", embedding_norm, "last = _behind(ids, T, stop - 1)", "last = stop", look),
    Mistake("a run counts in every piece", embedding_norm, "first = _behind(ids, T, first)", "first = first", look),
    Mistake("the last run is lost", embedding_norm, "    squares += acc * acc\n    tl.store", "    tl.store", look),
    Mistake(
        "skipped positions are read",
        embedding_norm,
        " & (tl.cast(current, tl.int64) != _SKIPPED)",
        "",
        lookups.test_ids_that_are_skipped_and_any_integers,
    ),
    Mistake("sorted positions are taken for positions", embedding_norm, "row * g_t", "at * g_t", look),
    Mistake(
        "ids are read as if they were in one piece",
        embedding_norm,
        "ids.contiguous().sort",
        "ids.sort",
        lambda: lookups.test_views("positions first"),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "_"))
def test_a_planted_mistake_is_caught(mistake: Mistake, tmp_path: Path) -> None:
    with planted(mistake, tmp_path), pytest.raises(AssertionError):
        mistake.test()
