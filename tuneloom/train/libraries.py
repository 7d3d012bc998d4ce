"""The modules that need torch, imported late and quietly: seconds in which the pulse goes on."""

import gc
import logging
import os
import warnings
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Libraries:
    """Our modules over torch, transformers, PEFT and TRL."""

    dpo: ModuleType
    integrations: ModuleType
    lora: ModuleType
    models: ModuleType
    scores: ModuleType
    steps: ModuleType


def import_libraries(threads: int) -> Libraries:
    """Import them, and let torch compute with `threads` threads (0: all cores)."""
    # One line of bitsandbytes on each start (it looks for the package `kernels`), and the trainer's notes on defaults.
    for name in ("bitsandbytes", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        from tuneloom.train import dpo, integrations, lora, models, scores, steps
    transformers.utils.logging.disable_progress_bar()
    lora.use_one_process()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return Libraries(dpo, integrations, lora, models, scores, steps)


def release_memory() -> None:
    """Give back what objects held that nothing refers to any more; trainers are full of cycles."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
