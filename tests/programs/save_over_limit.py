"""Save a run's checkpoint again where no file may be larger than 9,000 bytes: `save_over_limit.py FOLDER`.

This stands for a full disk.
"""

import resource
import sys
from pathlib import Path

from harness.storage import load_checkpoint, save_checkpoint

folder = Path(sys.argv[1])
state = load_checkpoint(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
try:
    save_checkpoint(folder, state)
except OSError as error:
    print(error)
