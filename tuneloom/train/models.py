"""A base's weights, an adapter on them, and the adapter's two files. No rows, no trainer, no store."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from tuneloom.bases import Base
from tuneloom.engine.loader import check_whole
from tuneloom.errors import InvalidRequest
from tuneloom.train.failure import BaseUnreadable, is_out_of_memory
from tuneloom.train.plan import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def has_fast_bf16(*, use_gpu: bool) -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32."""
    if use_gpu:
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_base(base: Base, plan: Plan, *, use_gpu: bool = False) -> PreTrainedModel:
    """The base's frozen weights in the precision of the plan, its linear layers quantised if the plan has it so.

    Raises:
        BaseUnreadable: they do not load.
    """
    dtype = DTYPES[plan.precision]
    how: dict[str, Any] = {
        "dtype": dtype,
        "local_files_only": True,
        "use_safetensors": True,
        "trust_remote_code": False,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    if plan.quantization != "none":
        how |= {"quantization_config": _quantised(plan, dtype), "device_map": "cuda:0" if use_gpu else "cpu"}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(base.path, **how)
        check_whole(base.id, report)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Whatever is wrong in the files shows here, as an error of any of four libraries.
        reason = f"{type(error).__name__}: {error}".replace(str(base.path), base.id)
        raise BaseUnreadable.of(base.id, reason) from error
    keep_trainable(model)
    return model


def _quantised(plan: Plan, dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 as in QLoRA, Dettmers et al. 2023, its scales quantised too; or LLM.int8."""
    if plan.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_trainable(model: torch.nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights.

    bitsandbytes 0.50 does so at the first product without gradients on a CPU with AVX512-BF16, for an operator that
    has no gradient: all later steps then learn from wrong gradients, without an error. Remove this when a step after an
    evaluation has the gradients of one without (tests/train/test_models.py).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def add_lora(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """`model` with the adapter that the plan starts from, or with a fresh one, the same for the same seed.

    The adapter is fp32 whatever the base's precision.

    Raises:
        InvalidRequest: a target module is none of the base's linear layers; the message lists those.
    """
    set_seed(plan.seed)
    if plan.start is not None:
        config = LoraConfig.from_pretrained(plan.start.folder)
        config.lora_dropout, config.inference_mode = plan.dropout, False
        adapted = PeftModel.from_pretrained(model, plan.start.folder, config=config, is_trainable=True)
    else:
        adapted = get_peft_model(model, _lora_config(model, plan))
    # TRL 1.16 rounds the adapters of a model that is marked so to bf16, in which small updates are lost.
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = False
    return adapted


def _lora_config(model: PreTrainedModel, plan: Plan) -> LoraConfig:
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    }
    targets = plan.target_modules or tuple(sorted(linear))
    if unknown := sorted(set(targets) - linear):
        raise InvalidRequest(
            f"`target_modules`: this base has no linear layer `{unknown[0]}`. It has {', '.join(sorted(linear))}.",
            param="tuneloom.target_modules",
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        use_rslora=plan.rslora,
        target_modules=list(targets),
        bias="none",
    )


def save_adapter(model: PeftModel, folder: Path, base_id: str) -> None:
    """Write the two files of an adapter; the same weights give the same bytes in any process."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    # A set has another order in each process.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain, indent=2, sort_keys=True))


def load_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
