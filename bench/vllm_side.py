"""The other side of `bench.against_vllm`, run by vLLM's own Python: reads works as JSON lines, answers with times.

Nothing of ours is imported, and neither vLLM nor torch before the options are read.
"""

import argparse
import json
import os
import sys
import time
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--base", required=True)
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--requests", type=int, default=32, help="that run at once")
    options.add_argument("--adapters", type=int, default=0, help="that run at once; 0: without LoRA")
    options.add_argument("--eager", action="store_true", help="without compiling")
    parsed = options.parse_args(arguments)
    # What vLLM prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    started = time.perf_counter()
    engine = _load(parsed)
    _say(answers, {"load_s": time.perf_counter() - started, **_versions()})
    for line in sys.stdin:
        _say(answers, _run(engine, json.loads(line)))


def _load(options: argparse.Namespace) -> Any:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # In one process the engine can be stepped from here, and no time is lost between two.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    lora: dict[str, Any] = {}
    if options.adapters:
        lora = {"enable_lora": True, "max_loras": options.adapters, "max_lora_rank": 16}
    model = LLM(
        options.base,
        dtype=options.dtype,
        max_model_len=512,
        max_num_seqs=options.requests,
        enforce_eager=options.eager,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **lora,
    )
    return model.llm_engine


def _run(engine: Any, work: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once; the time of all, of each first token, and what was answered."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(temperature=0, max_tokens=work["new"], ignore_eos=True, detokenize=False)
    loras = [LoRARequest(name, number, path) for name, number, path in work["adapters"]]
    now = getattr(time, work["clock"])
    started = now()
    for i, prompt in enumerate(work["prompts"]):
        lora = loras[i % len(loras)] if loras else None
        engine.add_request(f"{work['id']}-{i}", {"prompt_token_ids": prompt}, params, lora_request=lora)
    first: dict[str, float] = {}
    answers: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.outputs[0].token_ids:
                first.setdefault(output.request_id, now() - started)
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
    elapsed = now() - started
    ordered = [answers[f"{work['id']}-{i}"] for i in range(len(work["prompts"]))]
    return {"elapsed_s": elapsed, "first_s": list(first.values()), "answers": ordered}


def _versions() -> dict[str, Any]:
    import torch
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _say(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
