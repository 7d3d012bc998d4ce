"""From the base to a trained adapter in a folder: model, trainer, and the steps from the newest whole state on."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuneloom.train.best import BestAdapter
from tuneloom.train.checkpoints import SavedState
from tuneloom.train.follow import Task, pack
from tuneloom.train.inputs import Inputs
from tuneloom.train.libraries import Libraries
from tuneloom.train.lineage import Witness
from tuneloom.train.plan import Plan, settings_text
from tuneloom.train.progress import Voice
from tuneloom.train.publish import Outcome, Publisher
from tuneloom.train.run import Result, Run, early_end
from tuneloom.train.sample import Scored, pick_scored

if TYPE_CHECKING:
    from tuneloom.train.lora import LoraTrainer


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


def learn(run: Run, plan: Plan, inputs: Inputs, libraries: Libraries) -> Learned | Result:
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
    if (wanted := early_end(run.pulse)) is not None:
        return wanted
    state = run.checkpoints.latest()
    _announce(run.voice, plan, state)
    while not steps.go_on_from(state):
        if (wanted := early_end(run.pulse)) is not None:
            return wanted
    if not steps.evaluations.is_over:
        if run.team.size > 1:
            run.team.tell(
                Task(plan, pack(state.path if state else None), pack(run.folder / "trainer" if is_dpo else None))
            )
        trainer.learn(state.path if state else None)
        if (wanted := early_end(run.pulse)) is not None:
            return wanted
    tokens = trainer.batches.tokens_until(done := steps.last_step(state))
    outcome = Outcome(plan.hyperparameters, plan.rank, done, tokens, steps.take_best(), plan.settings)
    return _learned(run, plan, inputs, libraries, trainer, publisher, outcome)


def _learned(
    run: Run,
    plan: Plan,
    inputs: Inputs,
    libraries: Libraries,
    trainer: "LoraTrainer",
    publisher: Publisher,
    outcome: Outcome,
) -> Learned:
    """The adapter as it will be stored, and what the trainer knows that an engine must know too."""
    folder = run.folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    libraries.models.save_adapter(trainer.model, folder, run.base.id)
    scored = pick_scored(inputs.training)
    scores = libraries.scores.trainer_scores(trainer, scored)
    precision = plan.precision if plan.quantization == "none" else plan.quantization
    factors = libraries.scores.trainer_factors(trainer.model)
    return Learned(folder, publisher, outcome, precision, factors, scored, scores)


def _announce(voice: Voice, plan: Plan, state: SavedState | None) -> None:
    if state is not None:
        voice.say(f"Training goes on from the checkpoint at step {state.step}")
    elif voice.progress().logged_step == 0:
        voice.say("Settings: " + settings_text(plan.settings))
