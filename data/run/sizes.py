"""True architectures with random weights: speed and memory of a real model where nothing can be downloaded.

    --model random:qwen2.5-vl-7b

The numbers are those of the published config.json files. The tokenizer and chat template are those of the
tiny checkpoint (its few words take the first ids of the full vocabulary), so what such a model says means
nothing.
"""

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from data.run.precision import choose_attention, nf4_config

QWEN2_5_VISION = dict(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420, patch_size=14, window_size=112,
                      fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)  # fmt: skip
QWEN2_5_TEXT = dict(max_position_embeddings=128000, rms_norm_eps=1e-6, hidden_act="silu", rope_parameters={
                    "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})  # fmt: skip
QWEN3_VISION = dict(patch_size=16, num_heads=16, num_position_embeddings=2304)
QWEN3_SMALL_VISION = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
QWEN3_LARGE_VISION = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
QWEN3_TEXT = dict(head_dim=128, num_key_value_heads=8, vocab_size=151936, max_position_embeddings=262144, rms_norm_eps=1e-6,
                  rope_parameters={"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                                   "mrope_interleaved": True})  # fmt: skip
# name -> (sizes of the language model, sizes of the vision encoder, whether the output head is the input
# embedding)
SIZES = {
    "qwen2.5-vl-3b": (
        dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
             num_key_value_heads=2),
        dict(out_hidden_size=2048), True,
    ),
    "qwen2.5-vl-7b": (
        dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
             num_key_value_heads=4),
        dict(out_hidden_size=3584), False,
    ),
    "qwen3-vl-2b": (
        dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
        QWEN3_SMALL_VISION | dict(out_hidden_size=2048),
        True,
    ),
    "qwen3-vl-4b": (
        dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
        QWEN3_SMALL_VISION | dict(out_hidden_size=2560),
        True,
    ),
    "qwen3-vl-8b": (
        dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
        QWEN3_LARGE_VISION | dict(out_hidden_size=4096),
        False,
    ),
}  # fmt: skip


def random_processor(name: str) -> object:
    """The processor that goes with a size: real patches and limits, the tiny checkpoint's words."""
    from data.tiny import CHAT_TEMPLATE, train_tokenizer

    tokenizer = train_tokenizer()
    if name.startswith("qwen2.5"):
        size = {"shortest_edge": 3136, "longest_edge": 12845056}  # pixels of a picture
        image, video = Qwen2VLImageProcessor(size=size), Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False)
        return Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)
    size = {"shortest_edge": 4096, "longest_edge": 25165824}  # pixels of all pictures together
    image, video = Qwen2VLImageProcessor(patch_size=16), Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False)
    return Qwen3VLProcessor(image, tokenizer, video, chat_template=CHAT_TEMPLATE)


def random_config(name: str) -> PreTrainedConfig:
    """The configuration of a size. Raises ValueError with the list for a name that is not in it."""
    if name not in SIZES:
        raise ValueError(f"--model random:{name}: unknown; choose one of {', '.join(SIZES)}")
    from data.tiny import token_ids, train_tokenizer

    text, vision, tied = SIZES[name]
    tokenizer = train_tokenizer()
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    if name.startswith("qwen2.5"):
        text, vision, config = QWEN2_5_TEXT | text, QWEN2_5_VISION | vision, Qwen2_5_VLConfig
    else:
        text, vision, config = QWEN3_TEXT | text, QWEN3_VISION | vision, Qwen3VLConfig
    return config(text_config=text | ends, vision_config=vision, tie_word_embeddings=tied, **token_ids(tokenizer))


def random_model(name: str, dtype: torch.dtype, nf4: bool, device: torch.device | str) -> tuple[nn.Module, object]:
    """A model of a size with random weights, its language model in 4 bits if asked, and its processor.

    Each weight is made by itself, and a 4-bit one packed at once: no more memory is taken than the model holds in the end.
    """
    config = random_config(name)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config, attn_implementation=choose_attention())
    if nf4:
        quantize_language_model(hf, dtype, device)
    for module in hf.modules():
        for key, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                module._parameters[key] = nn.Parameter(torch.empty_like(weight, dtype=dtype, device=device))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[key] = torch.empty_like(buffer, device=device)
    hf.tie_weights()
    hf.initialize_weights()
    hf.generation_config.eos_token_id = config.text_config.eos_token_id
    hf.generation_config.pad_token_id = config.text_config.pad_token_id
    return hf, random_processor(name)


def quantize_language_model(hf: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Put random 4-bit layers in place of a skeleton's linear layers in the language model, as loading with nf4 does."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, linear in list(hf.model.language_model.named_modules()):
        if not isinstance(linear, nn.Linear):
            continue
        shape, bias = (linear.in_features, linear.out_features), linear.bias is not None
        small = Linear4bit(*shape, bias, torch.bfloat16, compress_statistics=True, quant_type="nf4", device="meta")
        weight = torch.randn(shape[::-1], dtype=torch.bfloat16, device=device) * hf.config.text_config.initializer_range
        small.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
        small.weight._is_hf_initialized = True  # initialize_weights leaves it as it is
        if bias:
            small.bias = nn.Parameter(torch.zeros(shape[1], dtype=dtype, device=device))
        hf.model.language_model.set_submodule(name, small)
    hf.config.quantization_config = nf4_config()
    hf.is_loaded_in_4bit, hf.is_quantized = True, True
