"""Before the first step: whether rows are served with the tokens that they are trained with.

A difference ends the job; it cannot be switched off. What stands after the last step is in `agreement`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from tuneloom.bases import Base
from tuneloom.domain import Job
from tuneloom.engine.text import Codec
from tuneloom.errors import InvalidRequest, TuneloomError
from tuneloom.rows import Scan
from tuneloom.store import Store
from tuneloom.train.data import PreferenceTokens, Tokens, length_limit
from tuneloom.train.inputs import Inputs
from tuneloom.train.render import Example, Renderer
from tuneloom.train.rendering import Difference, Tally, compare
from tuneloom.train.sample import MADE_UP, kinds_of, parts_of, pick_rows


class RenderingDiffers(TuneloomError):
    """A conversation is served with other tokens than it is trained with."""

    code = "fidelity_rendering"


def check_rendering(store: Store, job: Job, base: Base, inputs: Inputs) -> str:
    """Compare a sample of the training file's rows, and conversations made up here, with what serving makes of them.

    The rows are those of `inputs`, as they are about to be learned. Returns what was compared.

    Raises:
        RenderingDiffers: the first row that differs, with the place and both tokens.
    """
    learn_all = job.spec.options.loss_on == "all"
    renderer = Renderer.load(base.path, learn_all=learn_all)
    serving = Codec.load(base.path)
    limit = length_limit(job.spec, base)
    tally = Tally()
    file = store.records.files.get(job.spec.training_file).value
    with store.blobs.open(file.blob) as source:
        picked = pick_rows(Scan(method=None).rows(source))
    for each in picked:
        for side, part in enumerate(parts_of(each.row)):
            tokens = [_side(every, side) for every in (inputs.training, inputs.validation) if every is not None]
            trained = _find(tokens, renderer.render(part), limit, each.number) or _numbered(tokens[0], each.number)
            with _named(f"line {each.line} of `{file.filename}`", serving):
                compare(part, trained, serving, tally, limit=limit, learn_all=learn_all)
            tally.kinds.update(kinds_of(part))
        tally.rows += 1
    for kind, conversation in MADE_UP.items():
        try:
            example = renderer.render(conversation)
        except InvalidRequest:
            # The template takes no such conversation, neither here nor there.
            continue
        with _named(f"a made-up conversation with {kind}", serving):
            compare(conversation, example, serving, tally, limit=len(example.ids) + 1, learn_all=learn_all)
        tally.made_up += 1
    return tally.sentence()


def _side(tokens: Tokens | PreferenceTokens, side: int) -> Tokens:
    """Of pairs the preferred answers (0), or the others (1)."""
    return (tokens.chosen, tokens.rejected)[side] if isinstance(tokens, PreferenceTokens) else tokens


def _find(tokens: Sequence[Tokens], example: Example, limit: int, number: int) -> Example | None:
    """The trained row that is `example`, or its beginning of `limit` tokens; looked for from its `number` in the file.

    Rows that are held out move it towards the start.
    """
    ids = np.array(example.ids[:limit], dtype=np.int32)
    for each in tokens:
        alike = np.flatnonzero(each.lengths == len(ids))
        for place in alike[np.argsort(np.abs(alike - number), kind="stable")].tolist():
            start = each.offsets[place]
            if np.array_equal(each.ids[start : start + len(ids)], ids):
                return _row(each, place)
    return None


def _numbered(tokens: Tokens, number: int) -> Example:
    """What is learned at a row's place in the file, where nothing that is learned equals the row."""
    return _row(tokens, min(number, tokens.num_rows - 1))


def _row(tokens: Tokens, number: int) -> Example:
    row = slice(tokens.offsets[number], tokens.offsets[number + 1])
    return Example(tokens.ids[row].tolist(), tokens.learned[row].tolist())


@contextmanager
def _named(what: str, serving: Codec) -> Iterator[None]:
    """Turn a Difference into the error that ends the job."""
    try:
        yield
    except Difference as found:
        tokens = [
            "nothing" if id is None else f"{serving.token_text(id)[0]!r} ({id})" for id in (found.trained, found.served)
        ]
        raise RenderingDiffers(
            f"{what[0].upper()}{what[1:]} is not served as it is trained: at token {found.at} training has "
            f"{tokens[0]}, serving {tokens[1]} ({found.what}). Nothing was trained. If the files of the base have "
            "changed since the job was made, create it again; otherwise the base's chat template cannot be trained on."
        ) from found
