"""Ask each script that is named for its --help, as if it were started in a process of its own, and print its name."""

import runpy
import sys
from pathlib import Path

path = sys.path[1:]
known = set(sys.modules)
for script in sys.argv[1:]:
    sys.path[:], sys.argv = [str(Path(script).parent), *path], [script, "--help"]
    for name in [name for name in set(sys.modules) - known if name.split(".")[0] in ("harness", "machine")]:
        del sys.modules[name]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
    print(script, file=sys.stderr)
