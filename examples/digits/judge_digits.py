"""Judge a trained model's digits by a classifier of real ones.

    python examples/digits/judge_digits.py runs/digits_stf/version_0/checkpoints/last.ckpt

The classifier ships with the package (``lightning_vr.metrics.DigitFeatures``); it was trained on
four fifths of scikit-learn's digits.
"""

import argparse

import torch

from lightning_vr import DiffusionModule
from lightning_vr.data import digits
from lightning_vr.metrics import DigitFeatures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.samples = 50

    module = DiffusionModule.load_from_checkpoint(options.checkpoint, map_location="cpu")
    labels = torch.arange(options.samples) % 10
    samples = module.sample(options.samples, group=labels, progress=True)

    judge = DigitFeatures()
    real, _ = judge.probabilities(digits()[0]).max(dim=1)
    confidence, seen = judge.probabilities(samples).max(dim=1)
    frequencies = seen.bincount(minlength=10) / options.samples
    print(f"confidence above 0.9: {(confidence > 0.9).float().mean():.1%} of {options.samples}")
    print(f"confidence above 0.9: {(real > 0.9).float().mean():.1%} of the real digits")
    print(f"seen as the digit that was asked for: {(seen == labels).float().mean():.1%}")
    print(f"rarest digit: {frequencies.min():.1%} of the samples")


if __name__ == "__main__":
    main()
