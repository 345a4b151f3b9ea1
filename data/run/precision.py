"""How a model is held: its attention, and its 4-bit weights."""

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available


def choose_attention() -> str:
    """The fastest attention at hand, as transformers names it: flash-attn 4, 3 or 2 on a GPU that has it, else sdpa.

    Branches behind a shared prefix (stage 2) need a mask that flash-attn does not know: VideoLM runs them with
    flex_attention on a GPU and sdpa elsewhere, whatever is chosen here.
    """
    if torch.cuda.is_available():
        available = {4: is_flash_attn_4_available, 3: is_flash_attn_3_available, 2: is_flash_attn_2_available}
        for version, at_hand in available.items():
            if at_hand():
                return f"flash_attention_{version}"
    return "sdpa"


def nf4_config() -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation; the vision encoder and the output head stay as they are."""
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
