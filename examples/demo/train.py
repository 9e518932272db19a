"""Train the demo pipeline: handwritten digits in colour, in the architecture of Qwen-Image.

The result is a folder that `diffusers.QwenImagePipeline.from_pretrained` loads. With `--compile`,
an H100 needs about five minutes; `score.py` draws with the result and checks what it drew.
Needs scikit-learn: `pip install '.[train]'`.
"""

import argparse
from pathlib import Path

import torch
from data import colour_table, draw_digits, prompts
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from flow import build_transformer, train_flow
from text import CHAT_TEMPLATE, PREFIX_TOKENS, build_text_encoder, build_tokenizer
from vae import build_vae, encode_table, train_vae


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pipeline", help="folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawings", type=int, default=2000, help="drawings of each digit")
    parser.add_argument("--vae-steps", type=int, default=6000)
    parser.add_argument("--vae-batch", type=int, default=128)
    parser.add_argument("--flow-steps", type=int, default=26000)
    parser.add_argument("--flow-batch", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks for training")
    return parser.parse_args()


def main() -> None:
    """Build every part, train the autoencoder, then the transformer, and save the pipeline."""
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)

    tokenizer = build_tokenizer(prompts())
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=build_vae(args.seed),
        text_encoder=build_text_encoder(tokenizer, args.seed),
        tokenizer=tokenizer,
        transformer=build_transformer(args.seed),
    ).to(device)
    assert pipeline.prompt_template_encode == CHAT_TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == PREFIX_TOKENS
    with torch.no_grad():
        prompt_embeds, prompt_mask = pipeline.encode_prompt(prompts())
    prompt_embeds = prompt_embeds.float()

    colours = colour_table().to(device)
    ink = draw_digits(args.drawings, torch.Generator().manual_seed(args.seed)).to(device)
    train_vae(pipeline.vae, ink, colours, steps=args.vae_steps, batch=args.vae_batch)
    latents = encode_table(pipeline.vae, ink, colours)

    if args.compile:
        pipeline.transformer.compile_repeated_blocks()
    train_flow(
        pipeline.transformer,
        latents,
        prompt_embeds,
        prompt_mask,
        steps=args.flow_steps,
        batch=args.flow_batch,
    )

    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(args.output, safe_serialization=True)


if __name__ == "__main__":
    main()
