"""Run train.py with the given flags, without the names that Python has on Unix alone; workers are spawned."""

import multiprocessing
import os
import signal
import sys

import filelock  # noqa: F401 - packages of others know their platforms, and are imported before
import psutil  # noqa: F401
import torch  # noqa: F401

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    for module, name in (
        (os, "sysconf"),
        (os, "sched_getaffinity"),
        (os, "fork"),
        (os, "killpg"),
        (os, "getuid"),
        (os, "geteuid"),
        (signal, "SIGHUP"),
    ):
        if hasattr(module, name):
            delattr(module, name)
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None  # importing it is then an ImportError

    import train

    train.main(train.parse_args(sys.argv[1:]))
