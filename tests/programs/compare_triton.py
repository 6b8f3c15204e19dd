"""Compare the Triton kernel with the plain lookup; needs TRITON_INTERPRET=1 where there is no GPU."""

import torch
from triton_lookup import nearest_code_triton  # of benchmarks/

from quantizer import nearest_code

torch.manual_seed(0)
for n, size, dim in (0, 8, 4), (1, 1, 1), (70, 130, 5), (100, 513, 40):
    few = torch.randint(-3, 4, (max(1, size // 2), dim)).float()
    codebook = few[torch.randint(len(few), (size,))]  # each code several times
    z = torch.randint(-9, 10, (n, dim)) / 2
    expected = nearest_code(z, codebook)
    assert torch.equal(nearest_code_triton(z, codebook), expected)
    assert torch.equal(nearest_code_triton(2.0**70 * z, 2.0**70 * codebook), expected)
    assert torch.equal(nearest_code_triton(z + 100, codebook + 100), expected)
    z, codebook = torch.randn(dim, n).T, torch.randn(dim, size).T
    assert torch.equal(nearest_code_triton(z, codebook), nearest_code(z, codebook))
