"""One attempt of a job, from its records to its last word, in this process. Needs no Ray: the worker calls it.

claim the fence -> files to tokens -> plan -> base with LoRA -> newest whole state -> steps -> adapter, manifest
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneloom.bases import Base, get_base
from tuneloom.config import Settings
from tuneloom.domain import Job
from tuneloom.store import Store, open_store
from tuneloom.train.checkpoints import Checkpoints, SavedState
from tuneloom.train.failure import describe
from tuneloom.train.inputs import Inputs, read_inputs
from tuneloom.train.libraries import Libraries, import_libraries
from tuneloom.train.plan import Plan, make_plan, settings_text
from tuneloom.train.progress import FenceLost, Pulse, Voice
from tuneloom.train.publish import Outcome, Publisher
from tuneloom.train.start import fetch_start

logger = logging.getLogger(__name__)

Result = Literal["published", "paused", "cancelled", "failed", "stopped", "fenced"]


@dataclass(frozen=True)
class Run:
    """What the parts of one attempt work with. `folder` is the job's own on this machine."""

    settings: Settings
    store: Store
    voice: Voice
    pulse: Pulse
    job: Job
    base: Base
    folder: Path


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
    """Train; the last word if it is not that of the publisher."""
    try:
        job = store.records.jobs.get(job_id).value
        base = get_base(settings.bases_dir, job.spec.base)
        result = _train(Run(settings, store, voice, pulse, job, base, run_folder(settings, job_id)))
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


def _train(run: Run) -> Result:
    run.voice.say(stage="reading files")
    inputs = read_inputs(run.store, run.job, run.base, run.folder)
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    run.voice.say(stage="loading")
    train = run.settings.train
    libraries = import_libraries(train.threads)
    has_bf16 = libraries.models.has_fast_bf16(use_gpu=train.num_gpus > 0)
    start = fetch_start(run.store.blobs, run.job.spec, run.folder / "start")
    plan = make_plan(run.job.spec, inputs.training, run.base, has_bf16=has_bf16, start=start)
    run.voice.say(total_steps=plan.total_steps, resolved=plan.hyperparameters, settings=plan.settings)
    return _learn(run, plan, inputs, libraries)


def _learn(run: Run, plan: Plan, inputs: Inputs, libraries: Libraries) -> Result:
    """From the base to the adapter that is handed over."""
    lora, models, train = libraries.lora, libraries.models, run.settings.train
    model = models.add_lora(models.load_base(run.base, plan, use_gpu=train.num_gpus > 0), plan)
    checkpoints = Checkpoints(run.folder / "checkpoints", train.checkpoints_kept)
    publisher = Publisher(run.store, run.voice, run.job, run.base, checkpoints_kept=train.checkpoints_kept)
    steps = libraries.steps.Steps(
        plan,
        run.voice,
        run.pulse,
        checkpoints,
        publisher,
        every_steps=run.job.spec.options.checkpoint_every_steps,
        interval_s=train.checkpoint_interval_s,
        validation=inputs.validation,
    )
    trainer = lora.LoraTrainer(
        model,
        plan,
        inputs.training,
        lora.Batches(inputs.training.lengths, plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=models.load_tokenizer(run.base),
        base_id=run.base.id,
        folder=run.folder / "trainer",
        use_gpu=train.num_gpus > 0,
        callbacks=[steps],
        on_save=steps.save,
    )
    steps.follow(trainer)
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    state = checkpoints.latest()
    _announce(run.voice, plan, state)
    if state is not None:
        steps.metrics = state.facts["metrics"]
        publisher.checkpoint(state.path / lora.STATE_ADAPTER, state.step, steps.metrics, plan.rank)
    trainer.learn(state.path if state else None)
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    done = trainer.state.global_step
    assert done == plan.total_steps, "training ends early only where something else is wanted"
    outcome = Outcome(plan.hyperparameters, plan.rank, done, trainer.batches.tokens_until(done), steps.metrics)
    final = run.folder / "adapter"
    shutil.rmtree(final, ignore_errors=True)
    models.save_adapter(model, final, run.base.id)
    publisher.version(final, outcome)
    return "published"


def _early_end(pulse: Pulse) -> Result | None:
    """What to end with if the job is not wanted to go on."""
    ends: dict[str, Result] = {"pause": "paused", "cancel": "cancelled", "stop": "stopped"}
    return ends.get(pulse.intent(fresh=True))


def _announce(voice: Voice, plan: Plan, state: SavedState | None) -> None:
    if state is not None:
        voice.say(f"Training goes on from the checkpoint at step {state.step}")
    elif voice.progress().logged_step == 0:
        voice.say("Settings: " + settings_text(plan.settings))
