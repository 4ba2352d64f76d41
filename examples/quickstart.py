"""Fifteen lines to copy: the gradient noise scale of a small network while it learns."""

import torch
from torch import nn

import gnsfx

teacher = nn.Linear(32, 4)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4))
compiled = torch.compile(model, backend="gns")
noise = gnsfx.NoiseScale(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for x in torch.randn(200, 64, 32):  # 200 batches of 64 examples
    loss = nn.functional.mse_loss(compiled(x), teacher(x).detach() + torch.randn(64, 4))
    loss.backward()
    noise.step()  # after backward, before clipping and optimizer.step
    optimizer.step()
    optimizer.zero_grad()
print(noise.summary())
