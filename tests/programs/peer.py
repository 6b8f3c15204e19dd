"""Stands for the module of a public repository: the least that can be trained in its place."""

import torch


class VectorQuantizedVAE(torch.nn.Module):
    def __init__(self, *_sizes):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * x, self.scale * x, self.scale * x
