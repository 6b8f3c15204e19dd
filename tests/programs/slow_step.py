"""Run train.py, whose step 9 waits for Ctrl-C and then takes a minute longer: `slow_step.py FLAGS`."""

import signal
import time

from harness.run import Run

import train

schedule = Run.schedule


def slow_schedule(run, step):
    if step == 9:
        print("slow", flush=True)
        last = time.monotonic() + 60
        while signal.getsignal(signal.SIGINT) != signal.SIG_DFL and time.monotonic() < last:
            time.sleep(0.01)
        print("caught", flush=True)
        time.sleep(60)
    return schedule(run, step)


Run.schedule = slow_schedule
train.main(train.parse_args())
