"""Print how many bytes the process grows by in a lookup of 16,384 vectors among 65,536 codes."""

from machine import peak_memory  # of benchmarks/

import torch

from quantizer import VectorQuantizer

vq, z = VectorQuantizer(65_536, 2, kmeans_start=False).eval(), torch.randn(16_384, 2)
before = peak_memory()
vq(z)
print(peak_memory() - before)
