"""Contributions made one by one, in place of the collectors, so that only the arithmetic behind them is under test."""

import torch
from torch.nn import functional as F

from gnsfx import collector


class OneByOne:
    """Stands in for the collectors: per-example gradients by a loop of backward passes."""

    def __init__(self):
        self.sq_norm, self.examples = {}, torch.zeros(())
        self.refused, self.cleared, self.reason, self.sizes = {}, 0, None, ()

    def backward(self, model, x, y, scale=1.0):
        """What ``(mse_loss(model(x), y) * scale).backward()`` would do, with the norms on the side."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for example in range(len(x)):
            loss = F.mse_loss(model(x[example]), y[example]) * scale / len(x)
            grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
                if grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
                    self.sq_norm[name] = self.sq_norm.get(name, torch.zeros(())) + grad.square().sum()
        self.examples, self.sizes = self.examples + len(x), (*self.sizes, len(x))

    def totals(self, model):
        rows = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        reasons = [self.refused.get(n) or (None if n in self.sq_norm else "not seen") for n, _ in rows]
        measured = [n for (n, _), reason in zip(rows, reasons, strict=True) if reason is None]
        columns = [torch.stack([self.sq_norm[n].double(), self.examples.double()]) for n in measured]
        values = torch.stack(columns, 1) if columns else None
        return collector.Totals([n for n, _ in rows], [p for _, p in rows], reasons, values, [self], self.sizes)

    parameters = per_example = ()
    left_over = None

    def backwards(self, slots):
        return []

    def clear(self, slots):
        self.sq_norm, self.examples, self.sizes, self.cleared = {}, torch.zeros(()), (), self.cleared + 1

    def diagnose(self, model):
        return self.reason


def data(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=generator), torch.randn(size, 2, generator=generator)


def run(source, model, noise, sizes, scale=1.0):
    for seed, size in enumerate(sizes):
        model.zero_grad()
        source.backward(model, *data(size, seed), scale)
        yield noise.step()


def definition(model, x, y):
    """tr(Sigma) and |G|^2 of one batch by the definition: sample variance, and its mean's square less its share."""
    rows = []
    for example in range(len(x)):
        loss = F.mse_loss(model(x[example]), y[example])
        rows.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, [*model.parameters()])]))
    rows = torch.stack(rows).double()
    tr_sigma = rows.var(0, correction=1).sum()
    return float(tr_sigma), float(rows.mean(0).square().sum() - tr_sigma / len(x))
