"""A process that shares the steps of an attempt which another one leads. It writes no record and keeps no state."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tuneloom.bases import Base, get_base
from tuneloom.config import Settings
from tuneloom.domain import Job
from tuneloom.store import open_store
from tuneloom.train.folders import run_folder
from tuneloom.train.inputs import Inputs, read_inputs
from tuneloom.train.libraries import import_libraries
from tuneloom.train.plan import Plan
from tuneloom.train.team import Left, Team


@dataclass(frozen=True)
class Task:
    """What the leader is about to train: the files of the state that it goes on from, none at the start, and those in
    the folder of its trainer, such as the reference of preferences.
    """

    plan: Plan
    state: dict[str, bytes]
    beside: dict[str, bytes]


def pack(folder: Path | None) -> dict[str, bytes]:
    """The files in a folder, none without one."""
    if folder is None:
        return {}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def follow(settings: Settings, job_id: str, team: Team) -> None:
    """Compute this process's rows of each step until the leader has ended."""
    store = open_store(settings)
    try:
        job = store.records.jobs.get(job_id).value
        base = get_base(settings.bases_dir, job.spec.base)
        folder = Path(tempfile.mkdtemp(prefix=f"rank-{team.rank}-", dir=_parent(settings, job_id)))
        try:
            task = team.tell()
            # On the leader's machine its tokens are there; on another nothing may stay.
            inputs = read_inputs(store, job, base, folder.parent if any(folder.parent.glob("tokens-*")) else folder)
            _learn(settings, job, base, inputs, task, folder, team)
        except Left:
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        store.close()


def _parent(settings: Settings, job_id: str) -> Path:
    folder = run_folder(settings, job_id)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _learn(settings: Settings, job: Job, base: Base, inputs: Inputs, task: Task, folder: Path, team: Team) -> None:
    _unpack(task.beside, folder)
    _unpack(task.state, folder / "state")
    libraries = import_libraries(settings.train.threads)
    lora, models, dpo, plan = libraries.lora, libraries.models, libraries.dpo, task.plan
    is_dpo, use_gpu = plan.method == "dpo", settings.train.num_gpus > 0
    lengths = dpo.pair_lengths(inputs.training) if is_dpo else inputs.training.lengths
    trainer = (dpo.PreferenceTrainer if is_dpo else lora.LoraTrainer)(
        models.add_lora(models.load_base(base, plan, use_gpu=use_gpu), plan),
        plan,
        inputs.training,
        lora.Batches(lengths, plan.batch_size, plan.micro_size, plan.seed),
        tokenizer=models.load_tokenizer(base),
        base_id=base.id,
        folder=folder,
        use_gpu=use_gpu,
        callbacks=[lora.EndsTogether(team)],
        on_save=lambda _: None,
        team=team,
    )
    if is_dpo:
        trainer.prepare(None, lambda: True)
    trainer.learn(folder / "state" if task.state else None)


def _unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
