"""Train for a step with the flags given; print the first part of each module imported by then."""

import sys

import train

train.main(train.parse_args([f"--out-dir={sys.argv[1]}", *sys.argv[2:], "--steps=1"]))
print(*sorted({name.split(".")[0] for name in sys.modules}), sep="\n")
