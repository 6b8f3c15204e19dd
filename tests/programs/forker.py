"""Run a training script in children that are forked after the imports, and kill them where they are told to die.

Each line of stdin is a JSON object; each line of stdout is the exit code of that run, -9 if it was killed:
    command  the script's name, "train" or "train_prior", and its flags
    seconds  kill the run after so many
    changes  kill it right before its n-th change to its folder
    call     ["module.function", n]: kill it right before the n-th call of that function
    signal   [step, signum, times]: send this signal in a step so many times
"""

import importlib
import json
import os
import signal
import sys
import time

from harness.run import Run

import sklearn.datasets  # noqa: F401 - imported before the forks
import sklearn.decomposition  # noqa: F401

import train  # noqa: F401
import train_prior  # noqa: F401


def wrapped(function, before):
    def call(*args, **kwargs):
        before(*args)
        return function(*args, **kwargs)

    return call


def die_at(calls):
    """Return a function that kills this process when it is called for the n-th time."""
    left = [calls]

    def count(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def arrange(changes=None, call=None, signal=None):
    """Make this process die or get a signal as it was told."""
    if changes is not None:
        count = die_at(changes)
        for name in ("replace", "fsync", "link", "rename"):
            setattr(os, name, wrapped(getattr(os, name), count))
    if call is not None:
        path, calls = call
        module = importlib.import_module(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        setattr(module, name, wrapped(getattr(module, name), die_at(calls)))
    if signal is not None:
        at, signum, times = signal
        waiting = [signum] * times

        def send(_run, step):
            while step == at and waiting:
                os.kill(os.getpid(), waiting.pop())

        Run.schedule = wrapped(Run.schedule, send)


def run(command, seconds=None, **fate):
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - stays open until the child ends
        code = 0
        try:
            arrange(**fate)
            script = importlib.import_module(command[0])
            script.main(script.parse_args(command[1:]))
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 99
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)  # if it has ended, it is still there until we wait for it
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for line in sys.stdin:
    print(run(**json.loads(line)), flush=True)
