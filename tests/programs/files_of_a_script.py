"""Import a script, and print which files of its folder and of harness/ Python has read for it."""

import importlib
import sys
from pathlib import Path

script = Path(sys.argv[1])
importlib.import_module(script.stem)
files = {Path(module.__file__) for module in sys.modules.values() if getattr(module, "__file__", None)}
print(*(path for path in files if path.parent in (script.parent, script.parent / "harness")), sep="\n")
