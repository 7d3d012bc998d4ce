"""One attempt of a job, from its records to its last word, in this process. Needs no Ray: the worker calls it.

claim the fence -> files to tokens -> plan -> base with LoRA -> newest whole state -> steps -> adapter -> manifest

Before the first step and after the last stands a check that what is trained is what is served (`fidelity`).
"""

import logging
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tuneloom.bases import Base, get_base
from tuneloom.config import Settings
from tuneloom.domain import Job
from tuneloom.store import Store, open_store
from tuneloom.train.best import BestAdapter
from tuneloom.train.checkpoints import Checkpoints, SavedState
from tuneloom.train.deaths import Deaths
from tuneloom.train.failure import describe, is_out_of_memory
from tuneloom.train.fidelity import Compared, check_factors, check_rendering, check_scores, sentence
from tuneloom.train.fit import fit_plan
from tuneloom.train.folders import run_folder, stop_file
from tuneloom.train.follow import Task, pack
from tuneloom.train.inputs import Inputs, read_inputs
from tuneloom.train.libraries import Libraries, import_libraries, release_memory
from tuneloom.train.lineage import Witness
from tuneloom.train.memory import free_room
from tuneloom.train.meter import Meter
from tuneloom.train.micro import smaller, with_micro_size
from tuneloom.train.patience import PatientBlobs
from tuneloom.train.plan import Plan, make_plan, settings_text
from tuneloom.train.progress import FenceLost, Pulse, Voice
from tuneloom.train.publish import Outcome, Publisher
from tuneloom.train.sample import Scored, pick_scored
from tuneloom.train.start import fetch_start
from tuneloom.train.states import StoredStates, states_prefix
from tuneloom.train.team import ALONE, Left, StartAgain, Team

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
    checkpoints: Checkpoints
    deaths: Deaths
    team: Team


@dataclass(frozen=True)
class Learned:
    """A trained adapter in `folder`; its `factors` in the trainer, and what that thought of the rows `scored`, in its
    `precision`.
    """

    folder: Path
    publisher: Publisher
    outcome: Outcome
    precision: str
    factors: dict[str, Any]
    scored: tuple[Scored, ...]
    scores: list[list[float]]


def run_attempt(
    settings: Settings, job_id: str, attempt: int, notice: threading.Event | None = None, team: Team = ALONE
) -> Result:
    """Train and publish. Whatever happens is in the progress record, unless the attempt was stopped or replaced.

    `notice` is set when the node is about to be taken away: the run is then saved, and goes on elsewhere. The others of
    `team`, which this process leads, run `follow`.

    Raises:
        StartAgain: only with all processes of the team started anew can the run go on.
    """
    store = open_store(settings)
    store = replace(store, blobs=PatientBlobs(store.blobs))
    voice = Voice(store.records, job_id, attempt)
    try:
        before = voice.progress()
        if before.outcome is not None:
            return before.outcome
        voice.measure(Meter(before).read)
        folder = run_folder(settings, job_id)
        deaths = Deaths(folder, attempt)
        stored = StoredStates(store.blobs, states_prefix(job_id)) if settings.uploads_states else None
        checkpoints = Checkpoints(folder / "checkpoints", settings.train.checkpoints_kept, stored)
        with Pulse(voice, stop_file(settings, job_id, attempt), notice, deaths.look) as pulse:
            result = _run(settings, store, voice, pulse, job_id, checkpoints, deaths, team)
        deaths.end()
        if result in ("published", "cancelled", "failed"):
            shutil.rmtree(folder, ignore_errors=True)
            checkpoints.drop_stored()
        return result
    except FenceLost as error:
        logger.warning("stopping: %s", error)
        return "fenced"
    finally:
        store.close()


def _run(
    settings: Settings,
    store: Store,
    voice: Voice,
    pulse: Pulse,
    job_id: str,
    checkpoints: Checkpoints,
    deaths: Deaths,
    team: Team,
) -> Result:
    """Train; the last word if it is not that of the publisher."""
    folder = run_folder(settings, job_id)
    try:
        job = store.records.jobs.get(job_id).value
        base = get_base(settings.bases_dir, job.spec.base)
        result = _train(Run(settings, store, voice, pulse, job, base, folder, checkpoints, deaths, team))
    except (FenceLost, StartAgain):
        raise
    except Left as error:
        raise StartAgain from error
    except Exception as error:
        failure = describe(error, settings.home)
        if failure.code == "internal_error":
            logger.exception("job %s failed", job_id)
        # The last word needs room on a full disk, too; a replaced attempt must not touch what its successor uses.
        voice.progress()
        shutil.rmtree(folder, ignore_errors=True)
        voice.say(stage="failed", outcome="failed", error=failure)
        return "failed"
    if result in ("paused", "cancelled"):
        voice.say(stage=result, outcome=result)
    elif result == "stopped" and pulse.is_noticed:
        # As after a pause that was taken back: control starts the next attempt, and no loss is counted.
        step = voice.progress().step
        text = f"The machine is about to be taken away; saved at step {step}, training goes on elsewhere"
        voice.say(text, level="warn", stage="stopped", outcome="paused")
    return result


def _train(run: Run) -> Result:
    run.voice.say(stage="reading files")
    inputs = read_inputs(run.store, run.job, run.base, run.folder)
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    run.voice.say(check_rendering(run.store, run.job, run.base, inputs), stage="loading")
    train = run.settings.train
    libraries = import_libraries(train.threads)
    use_gpu = train.num_gpus > 0
    has_bf16 = libraries.models.has_fast_bf16(use_gpu=use_gpu)
    start = fetch_start(run.store.blobs, run.job.spec, run.folder / "start")
    plan = make_plan(run.job.spec, inputs.training, run.base, has_bf16=has_bf16, use_gpu=use_gpu, start=start)
    room = free_room(use_gpu=use_gpu, limit_bytes=train.memory_bytes)
    plan = fit_plan(plan, run.job.spec.options, run.base, room, run.voice.progress().settings)
    plan = _fit(run, plan)
    while True:
        run.voice.say(total_steps=plan.total_steps, resolved=plan.hyperparameters, settings=plan.settings)
        try:
            learned = _learn(run, plan, inputs, libraries)
            break
        except Exception as error:
            size = smaller(plan) if is_out_of_memory(error) else None
            if size is None:
                raise
            logger.warning("out of memory: %s", error)
        # Out of the handler, which holds the trainer by the frames of the error.
        release_memory()
        plan = _cut(run, plan, size, "the memory was not enough")
        if run.team.size > 1:
            # The others wait within the step that failed here.
            raise StartAgain
    return _hand_over(run, learned) if isinstance(learned, Learned) else learned


def _fit(run: Run, plan: Plan) -> Plan:
    """`plan` with the micro-batch that the run had before; a smaller one if it seems to have died of its size."""
    state = run.checkpoints.latest()
    known = run.deaths.micro_size or (state.facts["micro_size"] if state else None)
    if known is not None:
        plan = with_micro_size(plan, known, "as before the restart")
    size = smaller(plan)
    if run.deaths.too_large is None or size is None:
        return plan
    return _cut(run, plan, size, run.deaths.too_large)


def _cut(run: Run, plan: Plan, size: int, reason: str) -> Plan:
    run.deaths.cut(size)
    run.voice.say(
        f"{reason[0].upper()}{reason[1:]}: {size} of the {plan.batch_size} rows of a step at a time instead of "
        f"{plan.micro_size}; the steps stay the same",
        level="warn",
    )
    return with_micro_size(plan, size, reason)


def _learn(run: Run, plan: Plan, inputs: Inputs, libraries: Libraries) -> Learned | Result:
    """From the base to the adapter in a folder. What took memory is left to be released."""
    lora, models, train = libraries.lora, libraries.models, run.settings.train
    model = models.add_lora(models.load_base(run.base, plan, use_gpu=train.num_gpus > 0), plan)
    is_dpo = plan.method == "dpo"
    lengths = libraries.dpo.pair_lengths(inputs.training) if is_dpo else inputs.training.lengths
    batches = lora.Batches(lengths, plan.batch_size, plan.micro_size, plan.seed)
    witness = Witness(run.settings, run.store, run.job, run.base, plan, batches)
    publisher = Publisher(run.store, run.voice, run.job, run.base, witness, checkpoints_kept=train.checkpoints_kept)
    places = libraries.steps.Places(run.checkpoints, BestAdapter(run.folder / "best"), publisher, run.deaths)
    steps = libraries.steps.Steps(
        plan,
        run.voice,
        run.pulse,
        places,
        base_id=run.base.id,
        interval_s=plan.checkpoint_every_s or train.checkpoint_interval_s,
        validation=inputs.validation,
    )
    wandb = libraries.integrations.wandb_callbacks(
        run.job, plan, run.voice, run.folder, run.settings.home, lambda: steps.metrics
    )
    trainer = (libraries.dpo.PreferenceTrainer if is_dpo else lora.LoraTrainer)(
        model,
        plan,
        inputs.training,
        batches,
        tokenizer=models.load_tokenizer(run.base),
        base_id=run.base.id,
        folder=run.folder / "trainer",
        use_gpu=train.num_gpus > 0,
        callbacks=[steps, *wandb, lora.EndsTogether(run.team)],
        on_save=steps.save,
        team=run.team,
    )
    plan = witness.plan = trainer.plan
    steps.follow(trainer)
    if is_dpo:
        run.voice.say(stage="computing the reference")
        trainer.prepare(inputs.validation, lambda: run.pulse.intent() == "run")
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    state = run.checkpoints.latest()
    _announce(run.voice, plan, state)
    while not steps.go_on_from(state):
        if (wanted := _early_end(run.pulse)) is not None:
            return wanted
    if not steps.evaluations.is_over:
        if run.team.size > 1:
            run.team.tell(
                Task(plan, pack(state.path if state else None), pack(run.folder / "trainer" if is_dpo else None))
            )
        trainer.learn(state.path if state else None)
        if (wanted := _early_end(run.pulse)) is not None:
            return wanted
    done = steps.last_step(state)
    metrics = steps.take_best()
    tokens = trainer.batches.tokens_until(done)
    outcome = Outcome(plan.hyperparameters, plan.rank, done, tokens, metrics, plan.settings)
    final = run.folder / "adapter"
    shutil.rmtree(final, ignore_errors=True)
    models.save_adapter(model, final, run.base.id)
    scored = pick_scored(inputs.training)
    scores = libraries.scores.trainer_scores(trainer, scored)
    precision = plan.precision if plan.quantization == "none" else plan.quantization
    factors = libraries.scores.trainer_factors(model)
    return Learned(final, publisher, outcome, precision, factors, scored, scores)


def _hand_over(run: Run, learned: Learned) -> Result:
    """The adapter becomes what others can see, once an engine has computed with it what the trainer did."""
    run.voice.say(stage="checking")
    compared = _compare(run, learned)
    check_factors(learned.folder, learned.factors)
    if (wanted := _early_end(run.pulse)) is not None:
        return wanted
    outcome = replace(learned.outcome, fidelity=compared.fidelity, fidelity_note=compared.note)
    learned.publisher.version(learned.folder, outcome)
    return "published"


def _compare(run: Run, learned: Learned) -> Compared:
    """How closely an engine agrees with the trainer, told in the job's events."""
    compared = check_scores(run.settings, run.base, learned.folder, learned.scored, learned.scores, learned.precision)
    if compared.note is not None:
        run.voice.say(compared.note, level="warn")
    if compared.fidelity is not None:
        run.voice.say(sentence(compared.fidelity))
    return compared


def _early_end(pulse: Pulse) -> Result | None:
    """What to end with if the job is not wanted to go on."""
    ends: dict[str, Result] = {"pause": "paused", "cancel": "cancelled", "stop": "stopped"}
    return ends.get(pulse.intent(fresh=True))


def _announce(voice: Voice, plan: Plan, state: SavedState | None) -> None:
    if state is not None:
        voice.say(f"Training goes on from the checkpoint at step {state.step}")
    elif voice.progress().logged_step == 0:
        voice.say("Settings: " + settings_text(plan.settings))
