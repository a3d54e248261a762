"""Train digits on captions, and see what guidance does.

Each digit has a caption, such as "a drawing of a seven". A small embedding of words, trained with
the network, stands where a text encoder would; captions are dropped in a tenth of the draws. Then a
classifier of real digits says how many samples show the digit of their caption, for several scales
of guidance.

    python examples/captions/captioned_digits.py

writes ``runs/captions``: a picture with one row for each prompt after every validation, and the
table ``guidance.json``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn

from lightning_vr import EMA, Clean, DiffusionModule, SampleGrid, Sampler
from lightning_vr.data import Digits
from lightning_vr.metrics import DigitFeatures

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a {}", "the digit {}", "a drawing of a {}", "{} written by hand")
WORDS = sorted({word for text in TEMPLATES for word in text.split()} | set(NUMBERS))
LENGTH = 5
WIDTH = 32
GUIDANCE = (1.0, 2.0, 3.0, 5.0)


def caption(label: int, template: int) -> str:
    return TEMPLATES[template % len(TEMPLATES)].format(NUMBERS[label])


class TextEncoder(nn.Module):
    """Embeds words by a table and their places by another: ``(n, LENGTH, WIDTH)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 1, WIDTH)  # the last one fills short texts
        self.places = nn.Embedding(LENGTH, WIDTH)

    def forward(self, texts: list[str]) -> Tensor:
        rows = [[WORDS.index(word) for word in text.split()] for text in texts]
        padded = [row + [len(WORDS)] * (LENGTH - len(row)) for row in rows]
        numbers = torch.tensor(padded, device=self.places.weight.device)
        return self.words(numbers) + self.places.weight


class CaptionedDigits(DiffusionModule):
    """Digits on captions: in training drawn at random, in samples those that are asked for."""

    def __init__(self, width: int = 32, **settings: Any) -> None:
        network = UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
        )
        super().__init__(network, **settings)
        self.text_encoder = TextEncoder()

    def encode(self, batch: dict[str, Tensor]) -> Clean:
        templates = torch.randint(len(TEMPLATES), batch["label"].shape)
        rows = zip(batch["label"].tolist(), templates.tolist(), strict=True)
        cond = self.encode_condition({"prompt": [caption(*row) for row in rows]})
        return Clean(batch["image"], cond=cond)

    def encode_condition(self, rows: dict[str, list[str]]) -> dict[str, Tensor]:
        return {"encoder_hidden_states": self.text_encoder(rows["prompt"])}

    def encode_null(self) -> dict[str, Tensor]:
        return self.encode_condition({"prompt": [""]})


def guidance_table(module: CaptionedDigits, count: int, steps: int) -> list[dict[str, float]]:
    """Return the share of samples that show the digit of their caption, for each scale."""
    labels = torch.arange(count) % 10
    prompts = [caption(label, i // 10) for i, label in enumerate(labels.tolist())]
    with torch.no_grad():
        cond = module.encode_condition({"prompt": prompts})
    found = []
    for guidance in GUIDANCE:
        sampler = Sampler(steps=steps, guidance=guidance)
        samples = module.sample(count, cond=cond, sampler=sampler, seed=0)
        right = DigitFeatures().probabilities(samples).argmax(dim=1) == labels
        share = float(right.float().mean())
        error = (share * (1 - share) / count) ** 0.5
        found.append({"guidance": guidance, "right": share, "standard error": error})
        print(f"guidance {guidance:g}: {share:.1%} ± {error:.1%} show the digit of their caption")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=750)
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--sampler_steps", type=int, default=18)
    parser.add_argument("--folder", type=Path, default=Path("runs/captions"))
    parser.add_argument("--quick", action="store_true", help="smallest sizes, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.width, options.samples, options.sampler_steps = 3, 8, 20, 2

    seed_everything(0)
    module = CaptionedDigits(
        options.width,
        sigma_data=0.75,
        cond_dropout=0.1,
        sampler=Sampler(steps=options.sampler_steps),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
    )
    prompts = {"prompt": [caption(label, label) for label in range(10)]}
    trainer = Trainer(
        max_steps=options.steps,
        val_check_interval=max(1, options.steps // 3),
        check_val_every_n_epoch=None,
        default_root_dir=options.folder,
        logger=False,
        enable_checkpointing=False,
        callbacks=[EMA(decay=0.995), SampleGrid(conditions=prompts)],
    )
    trainer.fit(module, Digits())
    table = guidance_table(module.eval(), options.samples, options.sampler_steps)
    (options.folder / "guidance.json").write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
