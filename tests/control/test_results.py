from tests.control.conftest import add_job
from tuneloom.control.results import write_results
from tuneloom.domain import Event, JobSpec


def results_of(store, method: str, data: dict) -> list[str]:
    job = add_job(store)
    job = job.model_copy(update={"spec": JobSpec.model_validate({**job.spec.model_dump(), "method": method})})
    event = Event(id="e1", owner="ada", job_id=job.id, created_at=1.0, message="m", type="metrics", data=data)
    store.records.commit(store.records.events.create(event))
    return store.blobs.read(write_results(store, job, 2.0).blob).decode().splitlines()


def test_preferences_have_columns_for_their_rewards_and_other_jobs_have_not(store):
    plain = {"step": 1, "train_loss": 0.5, "train_mean_token_accuracy": 0.25}
    rewards = {"train_reward_margin": 1.5, "train_reward_accuracy": 1.0, "valid_reward_margin": 0.5}
    names = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert results_of(store, "supervised", plain) == [names, "1,0.5,0.25,,"]
    store.records.commit(store.records.events.delete(store.records.events.get("e1")))
    assert results_of(store, "dpo", plain | rewards) == [
        f"{names},train_reward_margin,train_reward_accuracy,valid_reward_margin,valid_reward_accuracy",
        "1,0.5,0.25,,,1.5,1.0,0.5,",
    ]
