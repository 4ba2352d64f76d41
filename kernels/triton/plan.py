"""How the Triton kernels cut their work: pure functions of shapes and of the number of multiprocessors.

What they can return is what the compile gate turns into cubins.
"""

import functools
from typing import NamedTuple

CHUNK, WHOLE, FLAT = 0, 1, 2
LARGEST_ROW = 16384
WHOLE_UP_TO = 4096
"""Two sums of a row and their totals fit the registers of a program up to this width."""
COLUMNS = 64
"""Of a program of stage two, which squares the sums of so many columns: one part of the norms."""


class Rows(NamedTuple):
    """Stage one of a norm layer's backward: how rows go to programs, and the shape of a program."""

    regime: int
    programs: int
    rows: int  # of a program; its examples in regime WHOLE
    pieces: int  # of an example, in regime CHUNK
    slots: int  # rows of the buffer between the stages


class RowTile(NamedTuple):
    block_d: int
    block_r: int
    warps: int
    stages: int


def row_tile(D: int, size: int = 2) -> RowTile:
    """Registers hold one tile of x and g and the sums of a program: 8 to 32 columns a thread, no spills up to 8192.

    With two stages the loads that a round begins are waited for at the start of the next, so that nothing is in flight; of the
    widest rows of four bytes (``size``) a number, no third stage fits.
    """
    block_d = max(32, 1 << (D - 1).bit_length())
    block_r = max(1, min(16, 4096 // block_d))
    warps = min(32, max(1, block_d * block_r // 512))
    return RowTile(block_d, block_r, warps, 2 if block_d * size > 32768 else 3)


def row_registers(tile: RowTile, regime: int) -> int | None:
    """Of a thread, at most, so that two programs of eight warps fit a multiprocessor; they spill nothing with so many. Two sums and
    their totals would: None, as many as it takes."""
    return 128 if tile.warps == 8 and regime != WHOLE else None


def row_gradients(D: int, rms: bool, size: int, of_each: int) -> int:
    """How many output gradients of ``of_each`` bytes a number a program adds up beside an x of ``size`` bytes.

    Sums of wider ones halve the programs that fit; for LayerNorm of wider rows they spill in the loop.
    """
    return 3 if D <= 8192 and of_each == 2 and (rms or size == 2) else 1


def row_parts(D: int) -> int:
    """How many parts the norms of a row of ``D`` numbers come in, in every regime."""
    return -(-D // COLUMNS)


def row_regimes(D: int) -> dict[int, tuple[int, int, int]]:
    """Regime -> a small B, T and number of multiprocessors that lead to it."""
    tile = row_tile(D)
    resident = max(1, min(2, 32 // tile.warps))
    found = {CHUNK: (3, 2 * tile.block_r + 1, 8), FLAT: (7 * resident, 9 * -(-2 * tile.block_r // 9), 9)}
    return found | ({WHOLE: (2 * resident + 1, 3, 1)} if D <= WHOLE_UP_TO else {})


def cut_rows(B: int, T: int, D: int, multiprocessors: int) -> Rows:
    """Rows of B examples with T positions each, for a machine that holds a few programs per multiprocessor."""
    tile = row_tile(D)
    target = multiprocessors * max(1, min(2, 32 // tile.warps))
    if B >= target and D <= WHOLE_UP_TO:
        each = -(-B // target)
        programs = -(-B // each)
        return Rows(WHOLE, programs, each, 0, programs)
    pieces = max(1, min(target // B, -(-T // tile.block_r)))
    each = -(-T // pieces)
    pieces = -(-T // each)
    run = max(tile.block_r, -(-B * T // target))
    programs = -(-B * T // run)
    if run <= T and programs * 5 > B * pieces * 6:  # no multiple of B comes near the number of programs that fit
        return Rows(FLAT, programs, run, 0, programs + B - 1)
    return Rows(CHUNK, B * pieces, each, pieces, B * pieces)


class Tiles(NamedTuple):
    """A program of the weight gradient's multiply: the edges of its block, its stages, and how many fit one multiprocessor."""

    t: int
    i: int
    o: int
    group: int
    warps: int
    stages: int
    resident: int


LARGE = Tiles(64, 128, 128, 8, 8, 4, 1)
SMALL = Tiles(64, 64, 128, 8, 4, 3, 3)
REDUCE = Tiles(64, 128, 256, 8, 8, 3, 1)
TILES = (LARGE, SMALL, REDUCE)
"""What the argument ``tile`` of the op ``mm_norm_parts`` stands for."""


def product_parts(I: int, O: int, tile: int) -> int:
    """How many parts the norms of products [I, O] come in."""
    return -(-I // TILES[tile].i) * -(-O // TILES[tile].o)


class Products(NamedTuple):
    """How [B] products [I, O] go to programs: tiles of the product, and runs of ``each`` examples."""

    tiles: Tiles
    blocks: int
    runs: int
    each: int

    @property
    def programs(self) -> int:
        return self.blocks * self.runs


SQUARE, PARTIAL, SPLIT = 96, 4, 400
"""Positions of a block that a multiprocessor multiplies in the time that it takes to square the block, that all of them take to
write and read the sum of one, and that the kernels take to start which add sums up and round them."""
MOST_ROUNDS = 8
"""Of programs that a multiprocessor runs, to share them out more evenly."""


@functools.lru_cache(maxsize=1024)
def cut_products(B: int, T: int, I: int, O: int, multiprocessors: int, tiles: Tiles) -> Products:
    """The runs of examples that finish first: enough of them to fill the machine evenly, each with sums of its own to add."""
    blocks = -(-I // tiles.i) * -(-O // tiles.o)

    def positions(runs: int) -> float:
        rounds = -(-blocks * runs // multiprocessors)
        each = -(-T // tiles.t) * tiles.t + SQUARE / min(rounds, tiles.resident)
        added = SPLIT + PARTIAL * runs * I * O / (tiles.i * tiles.o) if runs > 1 else 0
        return rounds * -(-B // runs) * each + added

    most = max(1, MOST_ROUNDS * max(multiprocessors * tiles.resident, blocks) // blocks)
    runs = min(range(1, min(B, most) + 1), key=positions)
    each = -(-B // runs)
    return Products(tiles, blocks, -(-B // each), each)


class GramTile(NamedTuple):
    t: int
    k: int
    warps: int
    stages: int


GRAMS = (GramTile(128, 64, 8, 3), GramTile(64, 64, 4, 3), GramTile(32, 64, 4, 3))
"""What the argument ``tile`` of the op ``gram_norm_parts`` stands for."""


def gram_parts(T: int, tile: int) -> int:
    """How many parts norms by Grams of T positions come in: pairs of blocks."""
    blocks = -(-T // GRAMS[tile].t)
    return blocks * (blocks + 1) // 2


PIECE, LOOKUP_COLUMNS = 16, 256
"""Sorted positions, and columns, of a program of the lookups' norms."""


def embedding_parts(T: int, D: int) -> int:
    """How many parts the norms of lookups of T rows of D numbers come in."""
    return -(-T // PIECE) * -(-D // LOOKUP_COLUMNS)
