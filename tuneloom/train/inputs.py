"""A job's files as tokens, for the attempt that trains on them. Reads the store; writes only what `data` keeps."""

from dataclasses import dataclass
from pathlib import Path

from tuneloom.bases import Base
from tuneloom.domain import Job
from tuneloom.errors import InvalidRequest
from tuneloom.store import Store
from tuneloom.train.data import PreferenceTokens, Tokens, load_tokens, split
from tuneloom.train.render import Renderer


@dataclass(frozen=True)
class Inputs:
    """The rows that are learned, and those of the validation loss; pairs for the method `dpo`."""

    training: Tokens | PreferenceTokens
    validation: Tokens | PreferenceTokens | None


def read_inputs(store: Store, job: Job, base: Base, folder: Path) -> Inputs:
    """Raises InvalidRequest if a file is gone, InvalidFile if a row cannot be learned."""
    renderers: list[Renderer] = []

    def renderer() -> Renderer:
        if not renderers:
            renderers.append(Renderer.load(base.path, learn_all=job.spec.options.loss_on == "all"))
        return renderers[0]

    def read(file_id: str, param: str) -> Tokens | PreferenceTokens:
        stored = store.records.files.find(file_id)
        if stored is None or stored.value.owner != job.owner:
            raise InvalidRequest(f"The file `{file_id}` is gone. Upload it again.", param=param)
        return load_tokens(store, stored.value, base, job.spec, folder, renderer)

    training = read(job.spec.training_file, "training_file")
    if (validation := job.spec.validation_file) is not None:
        return Inputs(training, read(validation, "validation_file"))
    return Inputs(*split(training, job.spec))
