"""Everything a run needs around its algorithm; nothing here imports a top-level file."""

import logging
import os
import sys
import threading

# If a standard stream is closed, the next file opened gets its number, and would receive the warnings of libraries.
for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
        setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - stays open until Python ends


def excepthook(kind, error, traceback):
    """Say one line if Ctrl-C comes while torch is being imported, which takes seconds."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def thread_excepthook(failed):
    """Say nothing of errors in TensorBoard's thread: its writer raises them again, and the run reports them."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


sys.excepthook, threading.excepthook = excepthook, thread_excepthook

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns on import if it cannot write to the home folder

# OpenMP's threads spin while they wait, by default so long that they nearly stop if there are more of them than cores.
# This must be set before torch is imported, so harness is imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
