"""Why a model has nothing to read, as a sentence that says what to do.

    collectors, norms and gradients there    None
    one of them missing                      what was left out or came too late: compiling, backward, another step

And what was refused in this step alone, which only its data can tell.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gnsfx._torch import allows_rnn
from gnsfx.leaves import Collector, collectors_of


def compiled(model: nn.Module) -> list[Collector]:
    """Every collector of the model's parameters, in the order they were compiled."""
    found = [c for p in model.parameters() for c, _ in collectors_of(p)]
    return list(dict.fromkeys(found))


def zeroed(model: nn.Module) -> bool:
    """Whether the gradients of a backward pass that was measured are gone."""
    return any(c.leaf.grad is not None for c in compiled(model)) and all(p.grad is None for p in model.parameters())


def diagnose(model: nn.Module) -> str | None:
    """Why there is nothing to read at all, as a sentence that says what to do; None if there is something."""
    collectors, gone = compiled(model), all(p.grad is None for p in model.parameters())
    arrived = any(c.leaf.grad is not None for c in collectors)
    if arrived and not gone:
        return None
    if collectors:
        if arrived:
            return "the gradients were zeroed after the last backward pass. Read before optimizer.zero_grad(), right after loss.backward()."
        arrived_last = all(c.begun == c.accumulated for c in collectors)  # not so after torch.autograd.grad
        if any(c.taken for c in collectors) and (arrived_last or not gone):
            return (
                "no backward pass was measured since noise.step() took the last one. Call it once per step, after the last "
                "loss.backward(), and read norms before it; one NoiseScale takes all that a graph measured: for parts of a "
                "model, read by_group() of one."
            )
        if any(c.begun >= 0 for c in collectors):
            return (
                "a backward pass ran, but left nothing in the collectors: torch.autograd.grad and backward(inputs=...) fill no .grad. "
                "Call loss.backward(), then read before optimizer.zero_grad()."
            )
        return "the model is compiled, but no backward pass ran since the last step. Call loss.backward() first."
    if getattr(model, "_compiled_call_impl", None) is not None:
        return (
            f"{type(model).__name__}.compile() compiled no graph: called in place, torch.compile skips classes that live in torch.nn, and "
            'a model that was not called yet. Use model = torch.compile(model, backend="gns"), or put the layers into a class of your own.'
        )
    if any(isinstance(m, DistributedDataParallel) for m in model.modules()):
        return (
            "no graph was compiled. Around a class that lives in torch.nn, torch.compile(DistributedDataParallel(model)) compiles nothing: use "
            'DistributedDataParallel(torch.compile(model, backend="gns")), or put the layers into a class of your own. Then run a '
            "forward and backward pass."
        )
    return (
        'no parameter of this model was seen by a graph compiled with backend="gns" that ran with gradients enabled. '
        'Use model = torch.compile(model, backend="gns") (or model.compile(backend="gns")) and run a forward and backward pass. '
        "A graph break inside a layer of torch.nn leaves all around it in eager mode: TORCH_LOGS=graph_breaks names it."
        f"{skipped(model)}"
    )


def skipped(model: nn.Module) -> str:
    """What to set for the layers that Dynamo does not trace by default, as a sentence; empty for a model without them."""
    layers = [(n, type(m).__name__) for n, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    if not layers or allows_rnn():
        return ""
    return (
        f" Dynamo runs {layers[0][1]} ({layers[0][0] or 'the model'}), and what follows it in the same function, in eager mode: "
        "set torch._dynamo.config.allow_rnn = True before compiling."
    )


def refused_in_run(model: nn.Module) -> dict[Collector, dict[int, str]]:
    """Slots that are measured in general and not in this step, with the reason: what left the graph was used there, or
    packed documents saw each other. One read of each collector that may refuse so."""
    return {c: c.graph.refused_in_run(c.leaf.grad) for c in compiled(model) if c.leaf.grad is not None}
