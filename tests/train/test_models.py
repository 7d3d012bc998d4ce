"""What a plan makes of a base and of the steps on it: each setting shows in weights, gradients or files."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, get_scheduler

from tests.engine.conftest import Harness, OpenCore, open_core, ref_of, request, tiny_prompts
from tests.train.conftest import BASE_ID, Lab, colour_rows
from tuneloom.bases import Base
from tuneloom.domain import AdapterRef, Hyperparameters, JobSpec, TrainOptions
from tuneloom.errors import InvalidRequest
from tuneloom.store.artifacts import check_adapter
from tuneloom.train import lora, models
from tuneloom.train.attempt import run_attempt
from tuneloom.train.data import Tokens
from tuneloom.train.plan import Plan, make_plan
from tuneloom.train.start import Start, read_start

__all__ = ["open_core", "tiny_prompts"]

ROWS, LENGTH = 16, 24
STEP = {"n_epochs": 2, "batch_size": 4}
QUANTISED = [("nf4", "fp32"), ("nf4", "bf16"), ("int8", "fp32"), ("int8", "bf16")]


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return Base(BASE_ID, tiny_base, "0", 512, 512, 1 << 20)


def rows() -> Tokens:
    """Rows that can be learned: each repeats three ids of its own."""
    ids = np.array([5 + (7 * row + column % 3) % 100 for row in range(ROWS) for column in range(LENGTH)], np.int32)
    return Tokens(ids, np.ones(len(ids), np.bool_), np.arange(ROWS + 1) * LENGTH)


def plan_of(base: Base, *, seed: int = 3, start: Start | None = None, asked: Any = STEP, **options: Any) -> Plan:
    spec = JobSpec(
        base=base.id,
        training_file="file-1",
        seed=seed,
        hyperparameters=Hyperparameters(**asked),
        options=TrainOptions(**{"rank": 4, "learning_rate": 5e-3, "precision": "fp32", **options}),
    )
    return make_plan(spec, rows(), base, has_bf16=False, start=start)


@dataclass
class Watch(TrainerCallback):
    """Collects what each step did."""

    gradient_norms: list[float] = field(default_factory=list)
    passes: int = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        gradients = [p.grad.norm() for p in known["model"].parameters() if p.grad is not None]
        self.gradient_norms.append(float(torch.stack(gradients).norm()))


@dataclass
class Trained:
    model: PeftModel
    log: list[dict[str, float]]
    watch: Watch

    def column(self, name: str) -> list[float]:
        return [entry[name] for entry in self.log if name in entry]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in self.model.named_parameters() if value.requires_grad}


Train = Callable[..., Trained]


@pytest.fixture
def train(base: Base, tmp_path: Path) -> Train:
    def run(plan: Plan | None = None, **options: Any) -> Trained:
        plan = plan or plan_of(base, **options)
        model, watch = models.add_lora(models.load_base(base, plan), plan), Watch()
        trainer = lora.LoraTrainer(
            model,
            plan,
            rows(),
            lora.Batches(rows().lengths, plan.batch_size, plan.micro_size, plan.seed),
            tokenizer=models.load_tokenizer(base),
            base_id=base.id,
            folder=tmp_path / "trainer",
            use_gpu=False,
            callbacks=[watch],
            on_save=lambda _: None,
        )
        inner = model.get_base_model().base_model

        def count(*_: Any) -> None:
            watch.passes += 1

        inner.register_forward_pre_hook(count)
        trainer.learn(None)
        return Trained(model, trainer.state.log_history, watch)

    return run


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_learning_rate_follows_the_scheduler(train: Train, scheduler: str, warmup: int) -> None:
    rates = train(scheduler=scheduler, warmup_steps=warmup).column("learning_rate")

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-3)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    plain = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=8)
    expected = []
    for _ in range(8):
        expected.append(plain.get_last_lr()[0])
        optimizer.step()
        plain.step()
    assert rates == pytest.approx(expected)
    assert rates[warmup] == 5e-3 and (rates[0] == 0) == bool(warmup)
    assert (rates[-1] == 5e-3) == (scheduler == "constant")


def test_weight_decay_shrinks_the_weights(train: Train) -> None:
    # The first half of each pair starts random, so decay is what changes its norm most.
    norms = {
        decay: sum(float(w.norm()) for name, w in train(weight_decay=decay).weights().items() if "lora_A" in name)
        for decay in (0.0, 1.0)
    }
    # By AdamW each step multiplies by 1 - rate x decay: linear from 5e-3, eight steps.
    assert norms[1.0] / norms[0.0] == pytest.approx(1 - 5e-3 * (1 + 1 / 8) * 4, abs=0.01)


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(train: Train) -> None:
    free, clipped = train(max_grad_norm=1e9), train(max_grad_norm=0.01)
    assert min(free.watch.gradient_norms) > 0.01
    assert clipped.watch.gradient_norms == pytest.approx([0.01] * 8, rel=1e-3)


def test_a_step_takes_the_forward_passes_that_are_asked_for(train: Train) -> None:
    whole, parts = train(accumulation_steps=1), train(accumulation_steps=4)
    assert (whole.watch.passes, parts.watch.passes) == (8, 32)
    assert whole.column("loss") == pytest.approx(parts.column("loss"), rel=1e-4)


def test_the_seed_decides_the_bytes(train: Train, tmp_path: Path) -> None:
    written = []
    for number, seed in enumerate((3, 3, 4)):
        models.save_adapter(train(seed=seed).model, tmp_path / str(number), BASE_ID)
        written.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_dropout_changes_what_is_learned(train: Train) -> None:
    plain, dropped = train(), train(dropout=0.3)
    assert differ(plain.weights(), dropped.weights())
    assert dropped.model.peft_config["default"].lora_dropout == 0.3


def test_gradient_checkpointing_keeps_less_and_learns_the_same(base: Base, train: Train) -> None:
    plain = train(dropout=0.1)
    again = train(replace(plan_of(base, dropout=0.1), gradient_checkpointing=True))
    assert again.watch.passes == plain.watch.passes
    for name, weight in plain.weights().items():
        torch.testing.assert_close(weight, again.weights()[name], atol=1e-6, rtol=1e-5)
    assert again.model.get_base_model().is_gradient_checkpointing


def test_rank_alpha_targets_and_rslora_are_in_the_adapter(base: Base, tmp_path: Path) -> None:
    plan = plan_of(base, rank=4, alpha=12.0, dropout=0.2, target_modules=("q_proj", "down_proj"), rslora=True)
    model = models.add_lora(models.load_base(base, plan), plan)
    models.save_adapter(model, tmp_path, BASE_ID)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"]) == (4, 12.0, 0.2, True)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in weights} == {"q_proj", "down_proj"} and len(weights) == 8
    assert all(4 in weight.shape and weight.dtype == torch.float32 for weight in weights.values())
    scalings = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scalings == {12.0 / math.sqrt(4)}


def test_a_target_that_the_base_has_not_is_refused_with_those_that_it_has(base: Base) -> None:
    plan = plan_of(base, target_modules=("qproj",))
    with pytest.raises(InvalidRequest, match=r"no linear layer `qproj`\. It has down_proj, gate_proj"):
        models.add_lora(models.load_base(base, plan), plan)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_base_and_adapters_are_fp32(base: Base, precision: str, dtype: torch.dtype) -> None:
    plan = plan_of(base, precision=precision)
    model = models.add_lora(models.load_base(base, plan), plan)
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {dtype}
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


# Quantised


def gradients(model: PeftModel, *, use_bf16: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 500, (2, 20), generator=torch.Generator().manual_seed(0))
    model.train()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        model(input_ids=ids, labels=ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def around_an_evaluation(base: Base, kind: str, precision: str) -> list[dict[str, torch.Tensor]]:
    """Gradients before and after what an evaluation does: products in eval mode, without gradients."""
    plan = plan_of(base, quantization=kind, precision=precision)
    model, use_bf16 = models.add_lora(models.load_base(base, plan), plan), precision == "bf16"
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    before = gradients(model, use_bf16=use_bf16)
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
        model(input_ids=torch.arange(3, 23)[None])
    return [before, gradients(model, use_bf16=use_bf16)]


@pytest.mark.parametrize(("kind", "precision"), QUANTISED)
def test_an_evaluation_leaves_the_gradients_of_a_quantised_base_as_they_were(
    base: Base, kind: str, precision: str
) -> None:
    before, after = around_an_evaluation(base, kind, precision)
    assert len(before) == 2 * 2 * 7
    assert not differ(before, after)


@pytest.mark.filterwarnings("ignore:.*autograd.*:UserWarning")
def test_left_alone_bitsandbytes_spoils_them_where_the_cpu_has_avx512_bf16(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import has_avx512bf16

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16")
    monkeypatch.setattr(models, "keep_trainable", lambda model: None)
    before, after = around_an_evaluation(base, "nf4", "fp32")
    # If this fails, bitsandbytes is mended and `keep_trainable` can go.
    assert differ(before, after)


def test_nf4_has_quantised_scales_and_computes_in_the_precision(base: Base) -> None:
    model = models.load_base(base, plan_of(base, quantization="nf4", precision="bf16"))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    for layer in layers:
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16 and not layer.support_avx512bf16_for_cpu
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "precision"), QUANTISED)
def test_a_quantised_base_learns_and_its_adapter_is_served_on_the_plain_one(
    base: Base,
    tiny_base: Path,
    train: Train,
    open_core: OpenCore,
    tiny_prompts: list[list[int]],
    tmp_path: Path,
    kind: str,
    precision: str,
) -> None:
    from tuneloom.bases import linear_shapes

    trained = train(quantization=kind, precision=precision, asked={"n_epochs": 6, "batch_size": 4})
    assert len([m for m in trained.model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]) == 14
    losses = trained.column("loss")
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert {weight.dtype for weight in trained.weights().values()} == {torch.float32}

    folder = tmp_path / "adapter"
    models.save_adapter(trained.model, folder, BASE_ID)
    assert check_adapter(folder, BASE_ID, linear_shapes(base), 4) == 4
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), folder)
    engine = open_core()
    served = serve(engine, tiny_prompts[3], ref_of(folder))
    prompt = torch.tensor([tiny_prompts[3]])
    answer = plain.generate(
        input_ids=prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert served == answer[0, prompt.shape[1] :].tolist()
    assert served != serve(engine, tiny_prompts[3], None)


def serve(engine: Harness, prompt: list[int], adapter: AdapterRef | None) -> list[int]:
    name = "tuned" if adapter else "base"
    engine.core.add(request(name, prompt, adapter=adapter))
    engine.run()
    return engine.tokens(name)


def test_a_job_on_a_quantised_base_is_published_and_says_so(lab: Lab) -> None:
    options = TrainOptions(rank=4, learning_rate=5e-3, quantization="nf4")
    job = lab.add_job(validation=colour_rows(6), options=options, n_epochs=4)
    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error
    losses = lab.losses(job.id)
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    settings = {setting.name: setting for setting in lab.progress(job.id).settings}
    assert (settings["quantization"].value, settings["quantization"].reason) == ("nf4", "as asked")
    (told,) = [event.message for event in lab.events(job.id) if event.message.startswith("Settings: ")]
    assert "quantization nf4: as asked" in told


def test_a_job_keeps_a_state_every_so_many_minutes(lab: Lab) -> None:
    job = lab.add_job(options=TrainOptions(rank=4, precision="fp32", checkpoint_every_minutes=1e-6), n_epochs=1)
    assert run_attempt(lab.settings, job.id, 1) == "published", lab.progress(job.id).error
    kept = [event.message for event in lab.events(job.id) if event.message.startswith("Checkpoint")]
    assert kept == [f"Checkpoint created at step {step}" for step in range(1, 7)]


# Warm start


@pytest.fixture
def start(train: Train, tmp_path: Path) -> Start:
    trained = train(rank=8, alpha=12.0, rslora=True, target_modules=("q_proj", "up_proj"))
    models.save_adapter(trained.model, tmp_path / "start", BASE_ID)
    return read_start(tmp_path / "start")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_warm_start_is_the_adapter_to_the_bit(
    base: Base, start: Start, tmp_path: Path, precision: str, kind: str
) -> None:
    plan = plan_of(base, start=start, rank=None, dropout=0.1, precision=precision, quantization=kind)
    assert (plan.rank, plan.alpha, plan.rslora, plan.target_modules) == (8, 12.0, True, ("q_proj", "up_proj"))

    model = models.add_lora(models.load_base(base, plan), plan)
    models.save_adapter(model, tmp_path / "again", BASE_ID)

    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (start.folder / name).read_bytes()
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_dropout"]) == (True, 0.1)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}


def test_a_warm_start_goes_on_from_the_loss_that_was_reached(base: Base, start: Start, train: Train) -> None:
    fresh = train(rank=8, target_modules=("q_proj", "up_proj"))
    warm = train(plan_of(base, start=start, rank=None))
    assert warm.column("loss")[0] < 0.9 * fresh.column("loss")[0]
    assert warm.column("loss")[-1] < warm.column("loss")[0]
