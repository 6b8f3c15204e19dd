"""All that a run needs around its algorithm; nothing here imports a file of the top level."""

import logging
import os
import sys

# The number of a stream that is closed would go to the next file opened, and then take the warnings of any library.
for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open until Python ends

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # on import, it warns of a home folder it cannot write to

# OpenMP's threads spin while they wait, by default so long that two trainings side by side slow each other down
# fivefold. It must be set before torch is imported, which is why imports of harness stand above those of torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
