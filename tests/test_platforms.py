"""The same on systems other than Linux, as far as Linux can show it."""

import json
import os
import signal
import sys

from harness.data import ignore_signals
from harness.machine import cpu_count

import pytest
from conftest import ROOT, SMALL, ended, program, save


def run_without_unix(folder, *flags):
    done = program("without_unix.py", *SMALL, f"--out-dir={folder}", "--steps=4", "--save-every=2", *flags)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    return done.stdout


def test_trains_without_unix_only_names(trained_run):
    """From the check of the flags to the summary; the finished run that is there makes way."""
    assert "moved the earlier run" in run_without_unix(trained_run)


def test_workers_start_without_unix_only_names(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delattr(signal, "SIGHUP")
    assert cpu_count() == os.cpu_count()
    ignore_signals(0)
    assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("given", "found"), [({}, "20000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")]
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(given, found):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    code = "import os, harness; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert ended([sys.executable, "-c", code], env=kept | given, cwd=ROOT).stdout.strip() == found


@pytest.mark.slow
def test_spawned_workers_read_images_from_disk(tmp_path):
    """As on macOS and Windows, where a worker is no copy of the process that starts it."""
    for i in range(20):
        save(tmp_path / "photos" / f"{i}.png")
    run_without_unix(tmp_path / "results", f"--dataset={tmp_path / 'photos'}", "--memory-limit=0")
