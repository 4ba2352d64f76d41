"""The report of a graph as it is kept: numbers and text, so that the graph can go and the report can be stored.

    Batched(dim, outer, inner)   sizes as numbers          Routed   mixed: rows chosen by data cross a graph break
    Mixed(reason, node)          the whole text            what no later graph can use: None

It is stored with the compiled graph. Where the compile caches hand that out the passes do not run, and nothing has to be
traced again to know what they did.
"""

from __future__ import annotations

import pickle
from dataclasses import fields, replace

from torch.fx import Node

from gnsfx._torch import size_hint
from gnsfx.passes.pipeline import Report
from gnsfx.passes.record import Record, explain_mixed
from gnsfx.passes.state import Batched, Mixed, Routed, Shared, State

CROSSES = "rows chosen by data cross a graph break; compile both graphs as one, with fullgraph=True"


def portable(report: Report) -> Report:
    """The report without nodes and symbolic sizes."""
    return replace(
        report, records=[_record(r) for r in report.records], outputs=[_result(state) for state in report.outputs]
    )


def pack(report: Report) -> bytes:
    return pickle.dumps(portable(report))


def unpack(kept: bytes) -> Report:
    return pickle.loads(kept)


def _record(record: Record) -> Record:
    nodes = {f.name: None for f in fields(record) if isinstance(getattr(record, f.name), Node)}
    shape = tuple(size_hint(s) for s in record.shape)
    return replace(record, shape=shape, costs=dict(record.costs), work=None, **nodes)


def _result(state: State | tuple | None) -> State | None:
    if isinstance(state, Batched):
        return Batched(state.dim, size_hint(state.outer), size_hint(state.inner))
    if isinstance(state, Routed):
        return Mixed(CROSSES)
    if isinstance(state, Mixed):
        return Mixed(explain_mixed(state))
    return state if isinstance(state, Shared) else None
