"""One attempt of a job, from its records to its last word, in this process. Needs no Ray: the worker calls it.

claim the fence -> files to tokens -> plan -> base with LoRA -> newest whole state -> steps -> adapter, manifest
"""

import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

from tuneloom.bases import Base, get_base
from tuneloom.config import Settings
from tuneloom.domain import Job
from tuneloom.errors import InvalidRequest
from tuneloom.store import Store, open_store
from tuneloom.train.checkpoints import Checkpoints, SavedState
from tuneloom.train.data import Tokens, load_tokens
from tuneloom.train.failure import describe
from tuneloom.train.plan import Plan, make_plan
from tuneloom.train.progress import FenceLost, Pulse, Voice
from tuneloom.train.publish import Outcome, Publisher
from tuneloom.train.render import Renderer

logger = logging.getLogger(__name__)

Result = Literal["published", "paused", "cancelled", "failed", "stopped", "fenced"]


def run_folder(settings: Settings, job_id: str) -> Path:
    """Where a job keeps its tokens and states on this machine."""
    return settings.home / "runs" / job_id


def stop_file(settings: Settings, job_id: str, attempt: int) -> Path:
    """It appears when the driver of an attempt is told to end."""
    return run_folder(settings, job_id) / f"stop-a{attempt}"


def run_attempt(settings: Settings, job_id: str, attempt: int) -> Result:
    """Train and publish. Whatever happens is in the progress record, unless the attempt was stopped or replaced."""
    store = open_store(settings)
    voice = Voice(store.records, job_id, attempt)
    try:
        if (before := voice.progress().outcome) is not None:
            return before
        with Pulse(voice, stop_file(settings, job_id, attempt)) as pulse:
            result = _run(settings, store, voice, pulse, job_id)
        if result in ("published", "cancelled", "failed"):
            shutil.rmtree(run_folder(settings, job_id), ignore_errors=True)
        return result
    except FenceLost as error:
        logger.warning("stopping: %s", error)
        return "fenced"
    finally:
        store.close()


def _run(settings: Settings, store: Store, voice: Voice, pulse: Pulse, job_id: str) -> Result:
    try:
        result = _train(settings, store, voice, pulse, store.records.jobs.get(job_id).value)
    except FenceLost:
        raise
    except Exception as error:
        failure = describe(error, settings.home)
        if failure.code == "internal_error":
            logger.exception("job %s failed", job_id)
        voice.say(stage="failed", outcome="failed", error=failure)
        return "failed"
    if result in ("paused", "cancelled"):
        voice.say(stage=result, outcome=result)
    return result


def _train(settings: Settings, store: Store, voice: Voice, pulse: Pulse, job: Job) -> Result:
    folder = run_folder(settings, job.id)
    base = get_base(settings.bases_dir, job.spec.base)
    voice.say(stage="reading files")
    training, validation = _read_files(store, job, base, folder)
    if (wanted := _early_end(pulse)) is not None:
        return wanted
    voice.say(stage="loading")
    lora, models, steps_type = _import_trainer()
    use_gpu = settings.train.num_gpus > 0
    _use_threads(settings.train.threads)
    plan = make_plan(job.spec, training, base, has_bf16=models.has_fast_bf16(use_gpu=use_gpu))
    voice.say(total_steps=plan.total_steps, resolved=plan.hyperparameters)
    model = models.add_lora(models.load_base(base, plan), plan)
    checkpoints = Checkpoints(folder / "checkpoints", settings.train.checkpoints_kept)
    publisher = Publisher(store, voice, job, base, checkpoints_kept=settings.train.checkpoints_kept)
    steps = steps_type(
        plan,
        voice,
        pulse,
        checkpoints,
        publisher,
        every_steps=job.spec.options.checkpoint_every_steps,
        interval_s=settings.train.checkpoint_interval_s,
        validation=validation,
    )
    trainer = lora.LoraTrainer(
        model,
        plan,
        training,
        lora.Batches(training.lengths, plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=models.load_tokenizer(base),
        base_id=base.id,
        folder=folder / "trainer",
        use_gpu=use_gpu,
        callbacks=[steps],
        on_save=steps.save,
    )
    steps.follow(trainer)
    if (wanted := _early_end(pulse)) is not None:
        return wanted
    state = checkpoints.latest()
    _announce(voice, plan, state)
    if state is not None:
        steps.metrics = state.facts["metrics"]
        publisher.checkpoint(state.path / lora.STATE_ADAPTER, state.step, steps.metrics, plan.rank)
    trainer.learn(state.path if state else None)
    if (wanted := _early_end(pulse)) is not None:
        return wanted
    done = trainer.state.global_step
    assert done == plan.total_steps, "training ends early only where something else is wanted"
    outcome = Outcome(plan.hyperparameters, plan.rank, done, trainer.batches.tokens_until(done), steps.metrics)
    final = folder / "adapter"
    shutil.rmtree(final, ignore_errors=True)
    models.save_adapter(model, final, base.id)
    publisher.version(final, outcome)
    return "published"


def _read_files(store: Store, job: Job, base: Base, folder: Path) -> tuple[Tokens, Tokens | None]:
    renderers: list[Renderer] = []

    def renderer() -> Renderer:
        if not renderers:
            renderers.append(Renderer.load(base.path, learn_all=job.spec.options.loss_on == "all"))
        return renderers[0]

    def read(file_id: str, param: str) -> Tokens:
        stored = store.records.files.find(file_id)
        if stored is None or stored.value.owner != job.owner:
            raise InvalidRequest(f"The file `{file_id}` is gone. Upload it again.", param=param)
        return load_tokens(store, stored.value, base, job.spec, folder, renderer)

    training = read(job.spec.training_file, "training_file")
    validation = job.spec.validation_file
    return training, read(validation, "validation_file") if validation else None


def _early_end(pulse: Pulse) -> Result | None:
    """What to end with if the job is not wanted to go on."""
    ends: dict[str, Result] = {"pause": "paused", "cancel": "cancelled", "stop": "stopped"}
    return ends.get(pulse.intent(fresh=True))


def _import_trainer():  # type: ignore[no-untyped-def]
    """The modules that need torch: seconds of imports, while the pulse goes on."""
    # One line of bitsandbytes on each start (it looks for the package `kernels`), and the trainer's notes on defaults.
    for name in ("bitsandbytes", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        from tuneloom.train import lora, models
        from tuneloom.train.steps import Steps
    transformers.utils.logging.disable_progress_bar()
    lora.use_one_process()
    return lora, models, Steps


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads or os.cpu_count() or 1)


def _announce(voice: Voice, plan: Plan, state: SavedState | None) -> None:
    if state is not None:
        voice.say(f"Training goes on from the checkpoint at step {state.step}")
    elif voice.progress().logged_step == 0:
        voice.say("Settings: " + "; ".join(plan.reasons))
