"""Models: load one to evaluate or to train, in full precision, with LoRA adapters, or in 4 bits; merge adapters again.

`--model` is a run's folder, a checkpoint, a Hugging Face directory, a name on the hub, or random:NAME, a true
architecture with random weights for measuring speed and memory where nothing can be downloaded.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import positions, videolm
from data.device import best_device, compute_dtype
from data.run.precision import choose_attention, nf4_config

Quantize = Literal["none", "nf4"]

# LoRA goes on every linear layer of the language model and, if the vision encoder is trained, on those of its blocks.
LANGUAGE_LINEARS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
VISION_LINEARS = r".*visual\.blocks.*\.(qkv|proj|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2)"


ADAPTER_FILE = "adapter_model.safetensors"
SMALL_MODEL = 20e6  # parameters


def find_checkpoint(model: str | Path) -> str:
    """The directory that `--model` means: a run's folder, a checkpoint, or a name on the hub as it is."""
    path = Path(model)
    if (path / "checkpoint").exists():
        return str((path / "checkpoint").resolve())
    if path.is_dir() and not (path / "config.json").exists() and not (path / "adapter").is_dir():
        raise ValueError(f"--model {path}: no checkpoint in this folder; train one with `python train_sft.py --out {path}`")
    return str(path.resolve()) if path.is_dir() else str(path)


def choose_threads(hf: nn.Module, device: torch.device | str) -> None:
    """One thread for a small model on a CPU, unless OMP_NUM_THREADS asks for another number: on tensors this small threads
    mostly wait for each other, and on a busy machine for seconds a step."""
    if torch.device(device).type == "cpu" and num_parameters(hf) < SMALL_MODEL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


def load_processor(model: str | Path) -> object:
    """The processor that `--model` means."""
    if str(model).startswith("random:"):
        from data.run.sizes import random_processor

        return random_processor(str(model).removeprefix("random:"))
    try:
        return AutoProcessor.from_pretrained(find_checkpoint(model))
    except OSError as error:
        raise ValueError(f"--model {model}: {str(error).strip().splitlines()[0]}") from None


def load_pretrained(
    model: str | Path, dtype: torch.dtype, quantize: Quantize = "none", device: torch.device | str | None = None
) -> tuple[nn.Module, object]:
    """The Hugging Face model that `--model` means, safetensors only, and its processor.

    dtype: of the weights (with nf4: of those that are not quantised). device: where to (default: the CPU). A checkpoint
    that holds an adapter only is loaded as its base with the adapter on top. Raises ValueError if it cannot be loaded.
    """
    if str(model).startswith("random:"):
        from data.run.sizes import random_model

        return random_model(str(model).removeprefix("random:"), dtype, quantize == "nf4", device or "cpu")
    source = find_checkpoint(model)
    adapter = Path(source, "adapter")
    adapter_only = adapter.is_dir() and not Path(source, "config.json").exists()
    more = {"attn_implementation": choose_attention(), "use_safetensors": True, "dtype": dtype}
    if quantize == "nf4":
        more |= {"quantization_config": nf4_config(), "device_map": {"": str(device or "cpu")}}
    try:
        base = (
            json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] if adapter_only else source
        )
        hf, found = AutoModelForImageTextToText.from_pretrained(
            base, output_loading_info=True, ignore_mismatched_sizes=True, **more
        )  # mismatched or missing, all are refused below, and by name
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--model {model}: {str(error).strip().splitlines()[0]}") from None
    refuse_other_weights(base, found)
    if adapter_only:
        from peft import PeftModel, get_peft_model_state_dict

        with warnings.catch_warnings(action="ignore", category=UserWarning):  # peft only warns of keys that it lacks
            hf = PeftModel.from_pretrained(hf, adapter)
        needed, there = (weights.keys() for weights in (get_peft_model_state_dict(hf), load_file(adapter / ADAPTER_FILE)))
        refuse_other_weights(adapter, {"missing_keys": needed - there, "unexpected_keys": there - needed})
    positions.use_published_positions(hf.get_base_model() if hasattr(hf, "get_base_model") else hf)
    for module in hf.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes 0.50 repacks 4-bit weights for inference on a CPU,
            module.support_avx512bf16_for_cpu = False  # and from then on they have no backward pass
    return hf.to(device) if device and quantize == "none" else hf, load_processor(model)


def refuse_other_weights(source: str | Path, found: Mapping) -> None:
    """Raise ValueError if a checkpoint's weights are not exactly the model's: what is missing would be random numbers.

    found: what transformers says of the loading.
    """
    wrong = []
    for what in ("missing", "unexpected", "mismatched"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in found.get(f"{what}_keys", ()))
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        wrong += [f"{what}: {', '.join(keys[:5])}{more}"] if keys else []
    if wrong:
        raise ValueError(
            f"--model {source}: its weights (*.safetensors) are not those that its configuration asks for; "
            f"{'; '.join(wrong)}. Give a checkpoint that is whole, with the config.json that was saved with it"
        )


def load_plain(model: str) -> tuple[torch.nn.Module, object]:
    """A Hugging Face model on the best device at hand, and its processor."""
    device = best_device()
    hf, processor = load_pretrained(model, compute_dtype(device))
    choose_threads(hf, device)
    return hf.to(device).eval(), processor


def load_model(model: str) -> tuple[videolm.VideoLM, object]:
    """A VideoLM on the best device at hand, and its processor."""
    hf, processor = load_plain(model)
    return videolm.VideoLM(hf).to(hf.device), processor  # the contrastive heads, too


def load_trainable(
    model: str, quantize: Quantize, lora_rank: int, freeze_vision: bool, gradient_checkpointing: bool, device: torch.device,
    resumed: Path | None = None,
) -> nn.Module:  # fmt: skip
    """The model to train, with adapters, frozen parts and checkpointing as asked.

    Without adapters all weights train in float32 (under bf16 autocast on a GPU). With adapters the frozen weights are bf16
    on a GPU, or 4-bit, and the adapters float32. resumed: a checkpoint of the same run to continue from. Raises ValueError
    for 4 bits without adapters.
    """
    if quantize == "nf4" and not lora_rank:
        raise ValueError("--quantize nf4: 4-bit weights cannot be trained themselves; give --lora-rank, such as 16")
    dtype = compute_dtype(device) if lora_rank else torch.float32
    hf, _ = load_pretrained(resumed if resumed and not lora_rank else model, dtype, quantize, device)
    if hasattr(hf, "get_base_model"):
        raise ValueError(f"--model {model} is an adapter; fold it in first: python eval.py merge {model}")
    if gradient_checkpointing:
        (getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable)()  # until 5.22
        hf.enable_input_require_grads()
    if freeze_vision:
        hf.model.visual.requires_grad_(False)
    if lora_rank:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        targets = LANGUAGE_LINEARS if freeze_vision else f"{LANGUAGE_LINEARS}|{VISION_LINEARS}"
        hf = get_peft_model(hf, LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=targets))
        if resumed:
            set_peft_model_state_dict(hf, load_file(resumed / "adapter/adapter_model.safetensors"))
    return hf


def make_optimizer(lm: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW over what is trained: the model's weights or adapters, and the contrastive heads."""
    groups = [{"params": [p for p in part.parameters() if p.requires_grad]} for part in (lm.hf, lm.heads)]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    steps: int,
    warmup: float,
    decay: float = 1.0,
    shape: Literal["cosine", "linear"] = "cosine",
) -> LambdaLR:
    """Warm-up, stable, decay: linearly up over a share of the steps, constant, down to zero over a share of the rest.

    warmup, decay: those shares, in [0, 1]; shape: of the way down.
    """
    # Late: its module imports peft and bitsandbytes with all that they need, seconds before a script could say anything.
    from transformers import get_wsd_schedule

    rising = int(warmup * steps)
    falling = int(decay * (steps - rising))
    return get_wsd_schedule(optimizer, rising, falling, steps, decay_type=shape)


# --- Many processes: FSDP2 ----------------------------------------------------------------------------------------------


def shard(lm: nn.Module, device: torch.device) -> None:
    """Shard a VideoLM over all processes, block by block (FSDP2): each holds its part of weights, gradients and optimizer.

    Weights stay in float32; on a GPU they are gathered, and computed with, in bf16. The contrastive heads are small, and
    stay whole.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = MixedPrecisionPolicy(compute_dtype(device), torch.float32)
    for block in [*lm.base.model.visual.blocks, *lm.base.model.language_model.layers]:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(lm, mesh=mesh, mp_policy=mixed, ignored_params=set(lm.heads.parameters()))
    for method in ("encode_examples", "log_probs", "caption_log_probs", "roll_out"):
        register_fsdp_forward_method(lm, method)


@contextmanager
def gathered(lm: nn.Module) -> Iterator[None]:
    """All weights on every process: while each decodes its own number of tokens they cannot be gathered layer by layer."""
    blocks = [m for m in lm.modules() if isinstance(m, FSDPModule)]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(block is not lm, recurse=False)
            block.reshard()


def whole_state(lm: nn.Module) -> dict[str, Tensor]:
    """A VideoLM's weights by name, put together again if they are sharded; then every process must call it, and the
    first one gets them, on the CPU."""
    first, state = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, weight in lm.state_dict().items():
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
            weight = weight.cpu() if first else None
        state[name] = weight
    return state


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of one part of a module, under the part's own names."""
    return {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}


def num_parameters(module: nn.Module) -> int:
    """Weights of a module; a byte of 4-bit ones counts as two."""
    return sum(p.numel() * (2 if hasattr(p, "quant_state") else 1) for p in module.parameters())


# --- Saving ------------------------------------------------------------------------------------------------------------
