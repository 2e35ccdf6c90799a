"""A block with two linears that share an input, for what watches or steps through forward passes."""

import torch
from torch import nn

LINEARS = ("gate", "up", "down")


class Feedforward(nn.Module):
    """Two weights that share an input, and one behind them; counts how often each runs."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.gate, self.up, self.down = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)
        self.unused = nn.Linear(8, 8)
        self.runs = []
        for name, module in self.named_children():
            module.register_forward_hook(lambda *_, name=name: self.runs.append(name))

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))
