"""A noise scale whose truth is chosen: what a controller reads, without a model."""

from __future__ import annotations

import math
import random

from gnsfx.noise.intervals import Interval


class StubNoise:
    """b_simple and interval as given; with ``spread``, log B_simple wanders around the truth as an average over
    ``memory`` steps does, and the interval is +- 1.96 of it."""

    process_group = None

    def __init__(self, b_simple=math.nan, interval=None, *, spread=0.0, memory=100, seed=0):
        self.truth, self.given, self.spread = b_simple, interval, spread
        self.keep, self.error, self.random = math.exp(-1 / memory), 0.0, random.Random(seed)
        self.steps = self.examples = self.skipped = 0
        self.tr_sigma, self.g_sq = 2.0, 0.01

    def tick(self, examples):
        self.steps, self.examples = self.steps + 1, self.examples + examples
        self.error = self.keep * self.error + math.sqrt(1 - self.keep**2) * self.random.gauss(0, 1)

    @property
    def b_simple(self):
        return self.truth * math.exp(self.spread * self.error)

    def interval(self, level=0.95):
        if self.given is not None:
            return Interval(*self.given)
        if math.isnan(self.truth):
            return Interval(0.0, math.inf)
        half = 1.96 * self.spread
        return Interval(self.b_simple * math.exp(-half), self.b_simple * math.exp(half))


def train(policy, noise, steps, **step):
    """Run the loop; the batch size of every step."""
    sizes = []
    for _ in range(steps):
        sizes.append(policy.batch_size)
        noise.tick(policy.batch_size)
        policy.step(**{"seconds": 1.0, **step})
    return sizes
