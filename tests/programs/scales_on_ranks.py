"""Train a multi-scale quantizer on this rank's part of the same batches; save its state after each step.

Usage: python tests/programs/scales_on_ranks.py RANK RANKS FOLDER
"""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from scales import MultiScaleQuantizer

BATCH, STEPS, RANKS = 5, 12, {1: [5], 2: [4, 1]}  # images per step, of all ranks; each rank's part


def main(rank, ranks, folder):
    if ranks > 1:
        options = {"rank": rank, "world_size": ranks, "timeout": datetime.timedelta(seconds=60)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", **options)
    batches = torch.randn(STEPS, BATCH, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    for ema in (False, True):
        torch.manual_seed(0)
        scales = [(1, 1), (2, 2), (3, 5)]
        quantizer = MultiScaleQuantizer(scales, 16, 4, ema=ema, decay=0.5, revive_below=0.5)
        parameters = list(quantizer.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        torch.manual_seed(rank)  # only what rank 0 draws by itself may matter
        history, revived = [], 0
        for batch in batches:
            z_e = batch.split(RANKS[ranks])[rank]
            z_q, _, codebook_loss, _ = quantizer(z_e)
            loss = codebook_loss + (z_q - z_e).square().mean()
            optimizer.zero_grad()
            (loss * len(z_e) / BATCH).backward()
            for parameter in parameters if ranks > 1 else []:
                dist.all_reduce(parameter.grad)
            revived += int(quantizer.revived.sum())
            quantizer.reset_revived(optimizer)
            optimizer.step()
            history.append({name: value.clone() for name, value in quantizer.state_dict().items()})
        assert revived, "no code was revived, so that revival was not compared"
        torch.save(history, Path(folder, f"{ranks}-{rank}-{ema}.pt"))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
