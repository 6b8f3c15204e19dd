"""Export the weights of a run, for use but not for training: `python pretrained/export.py --run results --out DIR`.

Writes checkpoint.pt, prior.pt if the run has a prior, and summary.json into a new folder, which evaluate.py,
reconstruct.py, sample.py and demo.py take as `--run`. Weights stay float32 if all files together take at most 8 MB. If
not, the prior's weights are rounded to float16, and if that is not enough, the VQ-VAE's too; the scripts still compute
in float32. The effect of the rounding is measured and printed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the repository's modules, imported below

from harness.cli import make_parser, say, user_errors
from harness.data import NAMES
from harness.storage import (
    CHECKPOINT,
    PRIOR,
    checkpoint_path,
    load_checkpoint,
    new_folder,
    save_checkpoint,
    write_whole,
)

import torch

from sample import draw_codes, labels_of, load_run, trained_on

MAX_BYTES = 8_000_000
KEPT = ("name", "code", "args", "identity", "progress")
PATHS = {"data_dir": "data", "out_dir": "results", "run": "results", "resume": None}  # not the exporting machine's
COMPARED = 100  # images drawn with the weights before and after


def weights_only(state: dict, weights: dict, half: bool) -> dict:
    """Return a checkpoint that holds only these weights: no optimizer and no random state.

    With `half`, matrices and kernels are float16. Vectors take little, and counts of codes may exceed its range.
    """
    kept = {name: value.half() if half and value.ndim > 1 else value for name, value in weights.items()}
    empty = {name: {} for name in ("typed", "random", "optimizer", "muon", "adamw")}
    empty["means"] = {"steps": 0, "sums": {}}
    args = without_paths(state["args"])
    return {name: state[name] for name in KEPT} | empty | {"weights_only": True, "args": args, "model": kept}


def without_paths(args: dict) -> dict:
    """Return arguments with the default folders instead of the exporting user's; of a folder of images, its name."""
    args = args | {name: path for name, path in PATHS.items() if args.get(name) is not None}
    if "dataset" not in args or args["dataset"] in NAMES:
        return args
    name = Path(args["dataset"]).name or "images"
    return args | {"dataset": f"./{name}" if name in NAMES else name}


def read_summary(run: str) -> dict:
    """Return the content of summary.json, without the exporting user's folders.

    Raises:
        ValueError: it is missing or damaged, or train.py did not write it.
    """
    path, remedy = Path(run, "summary.json"), "name the folder of a finished run"
    if not path.is_file():
        raise ValueError(f"{run} holds no summary.json; {remedy}")
    content = path.read_bytes()
    try:
        summary = json.loads(content)
        return without_paths(summary) | {"arguments": without_paths(summary["arguments"])}
    except Exception as error:  # other contents can raise almost any exception
        raise ValueError(f"{path} is damaged, or not a summary of train.py; {remedy}") from error


def export(run: str, out: Path, half: tuple[str, ...]) -> int:
    """Write the folder, with the weights in `half` as float16; return how many bytes it takes."""
    summary, state = read_summary(run), load_checkpoint(run)
    if summary.get("steps") != (step := state["progress"]["step"]):
        raise ValueError(f"the summary in {run} is not of step {step:,}, that of the checkpoint; finish the run first")
    save_checkpoint(out, weights_only(state, state["model"], CHECKPOINT in half), keep_previous=False)
    if checkpoint_path(run, PRIOR).is_file():
        state = load_checkpoint(run, PRIOR)
        kept = weights_only(state, state["best"]["model"], PRIOR in half)
        kept["best"], kept["model"] = state["best"] | {"model": kept["model"]}, {}
        kept["identity"] |= trained_on(load_checkpoint(out))  # the VQ-VAE's file has another digest now
        save_checkpoint(out, kept, PRIOR, keep_previous=False)
    write_whole(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    return sum(path.stat().st_size for path in out.iterdir())


def compare(run: str, out: Path) -> str:
    """Say how the folder differs from the run: the weights, and images drawn with the same seed."""
    (before, prior), (after, rounded) = load_run(run), load_run(out)
    largest = max((a - b).abs().max().item() for a, b in zip(before.state_dict().values(), after.state_dict().values()))
    labels = labels_of(prior, COMPARED)
    codes = [draw_codes(model, its, labels) for model, its in ((before, prior), (after, rounded))]
    same = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(*codes)]).all(0)
    return f"the VQ-VAE's weights differ by {largest:.1g} at most, {same.sum()} of {len(same)} samples have equal codes"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("Export the weights of a finished run, without what only training needs.")
    parser.add_argument("--run", default="results", help="folder of the run")
    parser.add_argument("--out", metavar="DIR", required=True, help="new folder to write to")
    return parser.parse_args(argv)


def main(args: argparse.Namespace):
    with user_errors(), new_folder(args.out) as out:
        for half in ((), (PRIOR,), (CHECKPOINT, PRIOR)):
            if (size := export(args.run, out, half)) <= MAX_BYTES:
                break
        else:
            raise ValueError(f"the weights take {size / 1e6:.1f} MB even as float16, more than {MAX_BYTES / 1e6:.0f}")
        rounded = " and ".join({CHECKPOINT: "the VQ-VAE", PRIOR: "the prior"}[name] for name in half)
        found = compare(args.run, out) if checkpoint_path(out, PRIOR).is_file() else "there is no prior"
    say(f"wrote {args.out}: {size / 1e6:.2f} MB, {f'{rounded} as float16' if half else 'all float32'}; {found}")


if __name__ == "__main__":
    main(parse_args())
