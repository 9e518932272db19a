"""The text side: a tiny byte-level BPE and a frozen, seeded Qwen2.5-VL language model."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

HIDDEN_SIZE = 64
PREFIX_TOKENS = 34
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def build_tokenizer(prompts: list[str]) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer with one token for every word of the pipeline's chat template and the prompts.

    The pipeline drops the first 34 tokens of the filled-in template: as many must precede the prompt.
    """
    blank = Qwen2Tokenizer(extra_special_tokens=CHAT_TOKENS + VISION_TOKENS)
    corpus = [CHAT_TEMPLATE.format(prompt) for prompt in prompts]
    tokenizer = blank.train_new_from_iterator(corpus, vocab_size=1024, min_frequency=1, show_progress=False)
    prefix = tokenizer(CHAT_TEMPLATE.split("{}")[0])["input_ids"]
    assert len(prefix) == PREFIX_TOKENS, f"the template's prefix is {len(prefix)} tokens long"
    for prompt in filter(str.strip, prompts):
        tokens = tokenizer(CHAT_TEMPLATE.format(prompt))["input_ids"]
        assert tokens[:PREFIX_TOKENS] == prefix
        assert len(tokenizer(prompt)["input_ids"]) == len(prompt.split()), f"not one token a word: {prompt}"
    return tokenizer


def build_text_encoder(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A two-layer Qwen2.5-VL with seeded random weights, scaled so that hidden states tell words apart."""
    ids = dict(zip(VISION_TOKENS, tokenizer.convert_tokens_to_ids(VISION_TOKENS), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": HIDDEN_SIZE**-0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": HIDDEN_SIZE,
            "fullatt_block_indexes": [0],
        },
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
    )
    torch.manual_seed(seed)
    encoder = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    return encoder.eval().requires_grad_(False)
