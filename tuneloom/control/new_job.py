"""A body that asks for a job becomes its spec, and the writes that create it. No HTTP."""

import random
import time
from dataclasses import dataclass

from tuneloom.control import files, models, turns
from tuneloom.control.context import ApiContext, check_may_use
from tuneloom.control.integrations import wandb_of
from tuneloom.control.job_body import CreateJob, check_supported, hyperparameters_of, method_of
from tuneloom.control.jobs import History
from tuneloom.domain import (
    Checkpoint,
    File,
    Job,
    JobSpec,
    Principal,
    TrainOptions,
    Version,
    check_model_name,
    check_settings_agree,
    model_id,
    new_id,
)
from tuneloom.errors import InvalidFile, InvalidRequest, ModelNotFound, QueueFull
from tuneloom.store.base import Write
from tuneloom.store.names import Named, find_named, find_start
from tuneloom.store.records import Stored


@dataclass(frozen=True)
class _Origin:
    """What is trained on: a base, and a Version or checkpoint of it where `model` names one."""

    base: str
    max_rank: int
    start: Stored[Version] | Stored[Checkpoint] | None = None


class NewJobs:
    """Reads what a body names among the things of its owner."""

    def __init__(self, context: ApiContext) -> None:
        self._context = context
        self._records = context.store.records

    def spec(self, who: Principal, body: CreateJob) -> JobSpec:
        """What is asked for. Raises InvalidRequest or ModelNotFound, naming the field."""
        check_supported(body)
        owner = who.owner
        origin = self._origin(who, body.model)
        options = self._options(owner, body, origin)
        spec = JobSpec(
            base=origin.base,
            training_file=body.training_file,
            validation_file=body.validation_file or None,
            suffix=self._suffix(who, body.suffix),
            seed=random.SystemRandom().randrange(2**31) if body.seed is None else body.seed,
            method=method_of(body),
            hyperparameters=hyperparameters_of(body),
            options=options,
            warm_start=find_start(self._records, owner, options.warm_start, origin.base, who.may_use)
            if options.warm_start
            else None,
            wandb=wandb_of(body.integrations),
            metadata=body.metadata,
        )
        if spec.warm_start is not None and spec.warm_start.rank > origin.max_rank:
            raise InvalidRequest(
                f"`{options.warm_start}` has the rank {spec.warm_start.rank}, above the largest that is served: "
                f"{origin.max_rank}.",
                param="tuneloom.warm_start",
            )
        check_settings_agree(spec)
        return spec

    def draft(
        self, owner: str, spec: JobSpec, requested_model: str, max_queued: int | None = None
    ) -> tuple[Job, list[Write]]:
        """A job and the writes that create it, against what is stored at this moment.

        `max_queued`: jobs of the owner that may wait; None: as the settings say.

        Raises:
            InvalidFile: the owner has no such file.
            QueueFull: too many jobs of the owner wait.
        """
        needed = self.files_of(owner, spec)
        self._check_base(owner, spec)
        place = self.place_in_queue(owner, max_queued)
        now = time.time()
        job = Job(id=new_id("ftjob-"), owner=owner, spec=spec, requested_model=requested_model, created_at=now)
        history = History(job, now)
        lines = [history.line(f"Created fine-tuning job: {job.id}")]
        lines += [history.line(f"Validating {param[:-5]} file: {file.value.id}") for param, file in needed.items()]
        writes: list[Write] = [self._records.events.create(line) for line in lines]
        return job, [self._records.jobs.create(job), *writes, place, *self._guards(owner, spec, needed)]

    def place_in_queue(self, owner: str, max_queued: int | None) -> Write:
        """The write that goes with one more waiting job, so that several at once do not take one place.

        Raises:
            QueueFull: as many jobs of the owner wait as may.
        """
        turn, limit = turns.take(self._records, owner, "jobs"), max_queued
        if limit is None:
            limit = self._context.settings.train.max_queued_per_owner
        waiting = sum(
            not stored.value.attempt_open
            for state in ("validating_files", "queued")
            for stored in self._records.jobs.query({"owner": owner, "state": state})
        )
        if waiting >= limit:
            raise QueueFull(f"{waiting} of your jobs wait already, the limit is {limit}. Wait for one or cancel one.")
        return turn

    def files_of(self, owner: str, spec: JobSpec) -> dict[str, Stored[File]]:
        """The files by the field that names them."""
        named = {"training_file": spec.training_file, "validation_file": spec.validation_file}
        return {param: self._file(owner, id, param) for param, id in named.items() if id}

    def _guards(self, owner: str, spec: JobSpec, needed: dict[str, Stored[File]]) -> list[Write]:
        """Writes that change nothing: deleting one of these things at this moment conflicts with them."""
        guards = {stored.value.id: stored for stored in needed.values()}
        writes: list[Write] = [self._records.files.replace(file, file.value) for file in guards.values()]
        found = find_named(self._records, owner, spec.options.warm_start) if spec.options.warm_start else None
        # A bare name may have moved on; the adapter that was found first counts.
        if found and found.version and found.version.value.adapter == spec.warm_start:
            writes.append(self._records.versions.replace(found.version, found.version.value))
        elif found and found.checkpoint:
            writes.append(self._records.checkpoints.replace(found.checkpoint, found.checkpoint.value))
        return writes

    def _origin(self, who: Principal, name: str) -> _Origin:
        """A base by id or alias, or what of the owner's `name` stands for, with its base."""
        base = self._context.find_base(name)
        if base is not None:
            return _Origin(base.id, base.engine.max_rank)
        found = find_named(self._records, who.owner, name)
        start = _adapter_of(found)
        if found is None or start is None or not who.may_use(found.model_name):
            raise ModelNotFound.named(name[:512])
        base = self._context.find_base(start.value.base)
        if base is None:
            raise InvalidRequest(f"`{name}` is on the base `{start.value.base}`, which is not served.", param="model")
        return _Origin(base.id, base.engine.max_rank, start)

    def _options(self, owner: str, body: CreateJob, origin: _Origin) -> TrainOptions:
        """The options, within what the engine of the base can serve afterwards."""
        options = body.tuneloom.of_training if body.tuneloom else TrainOptions()
        if options.rank is not None and options.rank > origin.max_rank:
            raise InvalidRequest(
                f"Invalid `tuneloom.rank`: {options.rank} is above the largest rank that is served: {origin.max_rank}.",
                param="tuneloom.rank",
            )
        if origin.start is None:
            return options
        if options.warm_start is not None:
            raise InvalidRequest(
                f"`model` and `tuneloom.warm_start` both name an adapter to go on from. Use the base, "
                f"`{origin.base}`, as `model`.",
                param="tuneloom.warm_start",
            )
        return options.model_copy(update={"warm_start": _pinned_name(origin.start.value)})

    def _suffix(self, who: Principal, suffix: str | None) -> str | None:
        """The Model to make. A key that is for some Models trains those, on any base."""
        if suffix is None:
            if who.models:
                raise InvalidRequest("This key is for some models only: name one of them as `suffix`.", param="suffix")
            return None
        check_may_use(who, suffix, suffix, param="suffix")
        self._context.check_free_name(check_model_name(suffix), param="suffix")
        return suffix

    def _check_base(self, owner: str, spec: JobSpec) -> None:
        if spec.suffix is not None:
            existing = self._records.models.find(model_id(owner, spec.suffix))
            if existing is not None:
                models.check_same_base(existing.value, spec.base)

    def _file(self, owner: str, id: str, param: str) -> Stored[File]:
        stored = files.find_file(self._records, owner, id, time.time())
        if stored is None:
            raise InvalidFile(f"`{param}`: there is no file `{id[:200]}`. Upload it first.", param=param)
        if stored.value.purpose != "fine-tune":
            raise InvalidFile(
                f"`{param}`: the file `{id}` has the purpose `{stored.value.purpose}`. "
                "Upload it with the purpose `fine-tune`.",
                param=param,
            )
        return stored


def _adapter_of(found: Named | None) -> Stored[Version] | Stored[Checkpoint] | None:
    return (found.version or found.checkpoint) if found else None


def _pinned_name(start: Version | Checkpoint) -> str:
    return start.pinned_name if isinstance(start, Version) else start.name
