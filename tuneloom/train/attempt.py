"""One attempt of a job, from its records to its last word, in this process. Needs no Ray: the worker calls it.

claim the fence -> files to tokens -> plan -> base with LoRA -> newest whole state -> steps -> adapter -> manifest

Before the first step and after the last stands a check that what is trained is what is served (`fidelity`).
"""

import logging
import shutil
import threading
from dataclasses import replace

from tuneloom.bases import get_base
from tuneloom.config import Settings
from tuneloom.store import Store, open_store
from tuneloom.train.agreement import Compared, check_factors, check_scores, sentence
from tuneloom.train.checkpoints import Checkpoints
from tuneloom.train.deaths import Deaths
from tuneloom.train.failure import describe, is_out_of_memory
from tuneloom.train.fidelity import check_rendering
from tuneloom.train.fit import fit_plan
from tuneloom.train.folders import run_folder, stop_file
from tuneloom.train.inputs import read_inputs
from tuneloom.train.learn import Learned, learn
from tuneloom.train.libraries import import_libraries, release_memory
from tuneloom.train.memory import free_room
from tuneloom.train.meter import Meter
from tuneloom.train.micro import smaller, with_micro_size
from tuneloom.train.patience import PatientBlobs
from tuneloom.train.plan import Plan, make_plan
from tuneloom.train.planned import check_rank
from tuneloom.train.progress import FenceLost, Pulse, Voice
from tuneloom.train.run import Result, Run, early_end
from tuneloom.train.start import fetch_start
from tuneloom.train.states import StoredStates, states_prefix
from tuneloom.train.team import ALONE, Left, StartAgain, Team

logger = logging.getLogger(__name__)


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
    if (wanted := early_end(run.pulse)) is not None:
        return wanted
    run.voice.say(check_rendering(run.store, run.job, run.base, inputs), stage="loading")
    train = run.settings.train
    libraries = import_libraries(train.threads)
    use_gpu = train.num_gpus > 0
    has_bf16 = libraries.models.has_fast_bf16(use_gpu=use_gpu)
    start = fetch_start(run.store.blobs, run.job.spec, run.folder / "start")
    plan = make_plan(run.job.spec, inputs.training, run.base, has_bf16=has_bf16, use_gpu=use_gpu, start=start)
    check_rank(run.settings, run.base, plan)
    room = free_room(use_gpu=use_gpu, limit_bytes=train.memory_bytes)
    plan = fit_plan(plan, run.job.spec.options, run.base, room, run.voice.progress().settings)
    plan = _fit(run, plan)
    while True:
        run.voice.say(total_steps=plan.total_steps, resolved=plan.hyperparameters, settings=plan.settings)
        try:
            learned = learn(run, plan, inputs, libraries)
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
    elif run.job.spec.micro_size is not None:
        plan = with_micro_size(plan, run.job.spec.micro_size, "as in the run that is repeated")
    size = smaller(plan)
    if run.deaths.too_large is None or size is None:
        return plan
    return _cut(run, plan, size, run.deaths.too_large)


def _cut(run: Run, plan: Plan, size: int, reason: str) -> Plan:
    fewer = with_micro_size(plan, size, reason)
    run.deaths.cut(fewer.micro_size)
    run.voice.say(
        f"{reason[0].upper()}{reason[1:]}: {fewer.micro_size} of the {plan.batch_size} rows of a step at a time "
        f"instead of {plan.micro_size}; the steps stay the same",
        level="warn",
    )
    return fewer


def _hand_over(run: Run, learned: Learned) -> Result:
    """The adapter becomes what others can see, once an engine has computed with it what the trainer did."""
    run.voice.say(stage="checking")
    compared = _compare(run, learned)
    check_factors(learned.folder, learned.factors)
    if (wanted := early_end(run.pulse)) is not None:
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
