"""What goes out is what a pipeline of Stable Diffusion is made of; it needs transformers."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from text_models import STEPS, WORDS, pictures_of

transformers = pytest.importorskip("transformers")


def test_a_stable_diffusion_pipeline_of_these_parts_draws_the_same_pictures(text, tmp_path):
    from diffusers import StableDiffusionPipeline

    module, folder = text
    config = transformers.CLIPTextConfig(
        vocab_size=4,
        hidden_size=6,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=3,
    )
    (tmp_path / "vocab.json").write_text(
        json.dumps({"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3})
    )
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=3
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder, subfolder="vae"),
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
        scheduler=DDIMScheduler.from_pretrained(folder, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    asked = {"height": 8, "width": 8, "num_inference_steps": STEPS, "output_type": "pt"}
    generator = torch.Generator().manual_seed(1)
    prompts = module.encode_condition({"prompt": WORDS})["encoder_hidden_states"]
    given = {"prompt_embeds": prompts, "negative_prompt_embeds": torch.zeros(2, 3, 6)}
    images = pipeline(guidance_scale=3.0, generator=generator, **given, **asked).images
    torch.testing.assert_close(
        images, pictures_of(module, pipeline.scheduler, 1), rtol=0, atol=1e-4
    )
    assert pipeline("a", **asked).images.isfinite().all()  # its own encoder fits too
