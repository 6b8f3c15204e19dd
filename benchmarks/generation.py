"""How good and how fast new images are: `python benchmarks/generation.py --run results`.

Aims, for `python train.py` and `python train_prior.py` on MNIST with their defaults: a classifier trained here on real
images recognises the requested class in at least 95% of the samples at temperature 1 without guidance, and in at least
99% at sample.py's defaults; the Frechet distance is at most 1.6 times that of the reconstructions; 100 samples take
less than 5 s. benchmarks/README.md says which aims are met.

The Frechet distance compares Gaussians fitted to the classifier's last features, for 10,000 images and the 10,000 test
images. For comparison, it is also computed for the reconstructed test images and for 10,000 real training images.
Each sample of neighbours.png stands above the training image nearest to it in pixels.
"""

import argparse
import itertools
import statistics
from pathlib import Path

from machine import heading, median_seconds, write_json

from harness import figures
from harness.cli import number, user_errors
from harness.data import dataset_of, to_pixels, to_uint8
from harness.storage import load_checkpoint, lock_folder, writable_folder

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sample as script
from prior import Prior

CPU = torch.device("cpu")


class Classifier(nn.Module):
    def __init__(self, channels: int, classes: int):
        super().__init__()

        def conv(inputs, outputs):
            return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

        self.features = nn.Sequential(
            conv(channels, 32),
            conv(32, 32),
            nn.MaxPool2d(2),
            conv(32, 64),
            conv(64, 64),
            nn.MaxPool2d(2),
            conv(64, 128),
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, 128) and the logits of images in [0, 1]."""
        features = self.features(x).mean((2, 3))
        return features, self.head(features)


def random_shift(x: Tensor, by: int = 2) -> Tensor:
    """Move each image by up to `by` pixels in each direction."""
    batch, _, height, width = x.shape
    down, right = torch.randint(0, 2 * by + 1, (2, batch))
    rows, columns = down[:, None] + torch.arange(height), right[:, None] + torch.arange(width)
    padded = F.pad(x, (by, by, by, by)).permute(0, 2, 3, 1)  # (B, H, W, C)
    moved = padded[torch.arange(batch)[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)  # channels last, as convolutions prefer


def train_classifier(images: Tensor, labels: Tensor, epochs: int = 4, batch_size: int = 100) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(images.shape[1], int(labels.max()) + 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // batch_size * batch_size].split(batch_size):
            with torch.autocast("cpu", torch.bfloat16):
                _, logits = model(random_shift(to_pixels(images[batch], CPU)))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def classify(model: Classifier, images: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return the features (N, 128) and the classes (N,) of uint8 images."""
    features, logits = zip(*(model(to_pixels(batch, CPU)) for batch in images.split(500)))
    return torch.cat(features).double().numpy(), torch.cat(logits).argmax(1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two sets of features (N, D) with covariances A and B."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


def distance_within(images: Tensor, labels: Tensor) -> float:
    """Return the mean distance (root of summed squares, pixels in [0, 1]) between the first 200 images of a class."""
    groups = [images[labels == label][:200].flatten(1).float() / 255 for label in labels.unique()]
    return statistics.mean(torch.pdist(group).mean().item() for group in groups)


def save_neighbours(path: Path, images: Tensor, train_images: Tensor):
    flat = train_images.flatten(1).float()
    nearest = torch.cat([torch.cdist(image[None].flatten(1).float(), flat).argmin(1) for image in images])
    rows = [row for pair in zip(images.split(8), train_images[nearest].split(8)) for row in pair]
    names = ["sample", "nearest training image"] * (len(rows) // 2)
    figures.save_grid(path, rows, "samples, each above the training image nearest to it", names)


@torch.inference_mode()
def generate_without_cache(prior: Prior, labels: Tensor) -> Tensor:
    codes = torch.zeros(len(labels), prior.length, dtype=torch.int64)
    ends = list(itertools.accumulate(prior.step_sizes))
    for at, end in zip([0, *ends], ends):
        share = prior(codes, labels)[:, at:end].softmax(-1)
        codes[:, at:end] = torch.multinomial(share.flatten(0, 1), 1).view(-1, end - at)
    return codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--run", default="results", help="folder of a run with a prior")
    parser.add_argument("--data-dir", help="folder of the data set, if it has moved since training")
    parser.add_argument("--num", type=number(int, 100), default=10_000, help="samples behind each line of the table")
    args = parser.parse_args()
    torch.set_num_threads(2)
    with user_errors():
        load_checkpoint(args.run)  # if it names no run, make no folder
        with lock_folder(writable_folder(args.run)):
            measure(args)


def measure(args: argparse.Namespace):
    model, prior = script.load_run(args.run)
    data = dataset_of(load_checkpoint(args.run), Path(args.run), args.data_dir)
    if data.train_labels is None:
        raise ValueError("--run needs images with classes")
    classifier = train_classifier(data.train_images, data.train_labels)
    real, found = classify(classifier, data.test_images)
    accuracy = (found == data.test_labels).float().mean().item()
    machine = heading()
    print(machine)
    print(f"classifier: {accuracy:.2%} correct on the real test images\n")

    with torch.inference_mode():
        x_recon = [model(to_pixels(batch, CPU)).x_recon for batch in data.test_images.split(500)]
    recon = to_uint8(torch.cat(x_recon).clamp(0, 1))
    some = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[: args.num]
    asked = script.labels_of(prior, args.num)
    plain = {"temperature": 1.0, "top_p": 1.0, "guidance": 1.0}
    shown = {
        "test images, reconstructed": (recon, data.test_labels),
        "training images": (data.train_images[some], data.train_labels[some]),
        "samples, temperature 1": (script.sample(model, prior, args.num, **plain), asked),
        "samples, sample.py's defaults": (script.sample(model, prior, args.num), asked),
    }
    table, of_recon = {}, None
    print("| images | class as asked | distance within a class | Frechet distance | relative to reconstructions |")
    print("|---|---|---|---|---|")
    print(f"| test images | {accuracy:.2%} | {distance_within(data.test_images, data.test_labels):.2f} | 0 | |")
    for name, (images, labels) in shown.items():
        features, classes = classify(classifier, images)
        distance = frechet(features, real)
        of_recon = of_recon or distance
        row = {"class_as_asked": (classes == labels).float().mean().item(), "frechet": distance}
        table[name] = row | {"distance_within": distance_within(images, labels), "ratio": distance / of_recon}
        print(
            "| {} | {class_as_asked:.2%} | {distance_within:.2f} | {frechet:.3f} | {ratio:.2f} |".format(
                name, **table[name]
            )
        )

    labels = torch.arange(100) % prior.classes
    speed = {
        "100 samples, sample.py's defaults": median_seconds(lambda: script.sample(model, prior, 100)),
        "codes of 100 images, with caches": median_seconds(lambda: script.generate(prior, labels)),
        "codes of 100 images, without caches": median_seconds(lambda: generate_without_cache(prior, labels), repeats=3),
    }
    print()
    for name, taken in speed.items():
        print(f"{name}: {taken:.2f} s")
    with_caches, without = list(speed.values())[1:]
    print(
        f"KV caches make sampling {without / with_caches:.1f} times as fast as recomputing all positions for each code"
    )
    save_neighbours(Path(args.run, "neighbours.png"), script.sample(model, prior, 16, seed=1), data.train_images)
    write_json(Path(args.run, "generation.json"), machine, args, {"classifier": accuracy, **table, **speed})


if __name__ == "__main__":
    main()
