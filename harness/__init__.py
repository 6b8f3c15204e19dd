"""All that a run needs around its algorithm; nothing here imports a file of the top level."""

import os

# OpenMP's threads spin while they wait, by default so long that two trainings side by side slow each other down
# fivefold. It must be set before torch is imported, which is why imports of harness stand above those of torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
