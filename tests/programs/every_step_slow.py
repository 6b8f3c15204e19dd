"""Run train.py with steps of at least 0.2 s: `every_step_slow.py FLAGS`."""

import time

from harness.run import Run

import train

schedule = Run.schedule


def slow_schedule(run, step):
    time.sleep(0.2)
    return schedule(run, step)


Run.schedule = slow_schedule
train.main(train.parse_args())
