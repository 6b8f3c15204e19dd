"""Train for a step with the flags given; print the first part of each imported module before it and after it."""

import sys

import train


def print_imported():
    print(*sorted({name.split(".")[0] for name in sys.modules}), sep="\n")


print_imported()
train.main(train.parse_args([f"--out-dir={sys.argv[1]}", *sys.argv[2:], "--steps=1"]))
print_imported()
