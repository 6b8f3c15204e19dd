"""Print how many bytes the process grows by when it holds 100 MB more."""

from machine import peak_memory  # of benchmarks/

before = peak_memory()
held = b"1" * 10**8
print(peak_memory() - before)
