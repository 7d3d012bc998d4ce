"""The seam inside Ray Train that `LeanTrainer` overrides, as the pinned Ray has it."""

from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from tuneloom.train.trainer import NEEDLESS, LeanTrainer


def made(kind: type[DataParallelTrainer], tmp_path) -> set[type]:
    config = RunConfig(name="a", storage_path=str(tmp_path))
    trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=1), run_config=config)
    return {type(callback) for callback in trainer._create_default_callbacks()}


def test_only_what_a_run_of_one_worker_does_not_use_is_left_out(tmp_path) -> None:
    plain, lean = made(DataParallelTrainer, tmp_path), made(LeanTrainer, tmp_path)
    assert plain - lean == set(NEEDLESS)
    assert lean and lean < plain
