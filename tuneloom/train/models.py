"""A base's weights, an adapter on them, and the adapter's two files. No rows, no trainer, no store."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tuneloom.bases import Base
from tuneloom.errors import InvalidRequest
from tuneloom.train.failure import BaseUnreadable
from tuneloom.train.plan import Plan


def has_fast_bf16(*, use_gpu: bool) -> bool:
    """Whether this machine multiplies bf16 matrices faster than fp32."""
    if use_gpu:
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def load_base(base: Base, plan: Plan) -> PreTrainedModel:
    """The base's weights in the precision of the plan.

    Raises:
        BaseUnreadable: they do not load.
    """
    dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
    try:
        return AutoModelForCausalLM.from_pretrained(
            base.path, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except MemoryError:
        raise
    except Exception as error:
        # Whatever is wrong in the files shows here, as an error of any of four libraries.
        reason = f"{type(error).__name__}: {error}".replace(str(base.path), base.id)
        raise BaseUnreadable(
            f"The base `{base.id}` cannot be loaded ({reason[:300]}). Add it again: `tuneloom bases add`."
        ) from error


def add_lora(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """`model` with fresh adapters, the same for the same seed: fp32 whatever the base's precision.

    Raises:
        InvalidRequest: a target module is none of the base's linear layers; the message lists those.
    """
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
    set_seed(plan.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=plan.dropout,
        target_modules=list(targets),
        bias="none",
    )
    return get_peft_model(model, config)


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
