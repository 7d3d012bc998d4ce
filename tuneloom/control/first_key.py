"""The first key of a model, made with the job that makes the model: that is when somebody is there to see its secret.

Its id is that of the job, so that a repetition of the create finds it again. Nothing of it is noted in the job.
"""

import dataclasses
import time

from tuneloom.config import Pepper
from tuneloom.control import keys
from tuneloom.control.key_rights import check_covers, inherit_end, owner_of
from tuneloom.control.keys import Minted
from tuneloom.domain import Actor, ApiKey, Job, Principal, model_name
from tuneloom.store.base import Write
from tuneloom.store.records import Records


def draft(
    records: Records, pepper: Pepper, principal: Principal, job: Job, actor: Actor
) -> tuple[Minted | None, list[Write]]:
    """A key that calls the job's model and nothing else, and the writes that make it.

    None if a working key is for that model alone already: another one is made by who asks for it.

    Raises:
        PermissionDenied: the caller may not make it.
    """
    owner_of(principal, job.owner)
    name, now = model_name(job.spec, job.id), time.time()
    if any(key.models == (name,) and key.is_live(now) for key in keys.list_keys(records, job.owner)):
        return None, []
    minted = keys.draft(
        pepper,
        owner=job.owner,
        name=name,
        scopes=keys.MODEL_SCOPES,
        expires_in=None,
        models=(name,),
        id=_id_of(job),
    )
    minted = dataclasses.replace(minted, key=inherit_end(principal, minted.key))
    check_covers(principal, minted.key)
    return minted, keys.creation(records, minted.key, actor)


def again(records: Records, pepper: Pepper, job: Job, actor: Actor) -> Minted | ApiKey | None:
    """What a repetition of the create shows: the key with a secret in the place of one that nobody has seen.

    Without a secret once it was used, since then somebody has seen it; None if there is no such key, or it is over.
    """
    stored = records.keys.find(_id_of(job))
    if stored is None or not stored.value.is_live(time.time()):
        return None
    if stored.value.last_used_at is not None:
        return stored.value
    return keys.reissue(records, pepper, stored.value.id, actor)


def _id_of(job: Job) -> str:
    return "key_" + job.id.removeprefix("ftjob-")
