"""Ray Train's trainer for runs of one worker, with no process that such a run does not use. Each costs two seconds of a
core before the first step, and 100 MB while the run lasts.
"""

from typing import Any

# What lies under `TorchTrainer`, which would import torch in the driver and the controller, seconds each, and make a
# process group that one worker has no use for.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

# A process for Ray's data sets: rows come from our own files. And one that gives a killed controller's places back:
# Ray does that when the driver ends, and ours ends with its controller.
NEEDLESS = (DatasetsCallback, PlacementGroupCleanerCallback)


class LeanTrainer(DataParallelTrainer):
    """Made and used like its parent."""

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, NEEDLESS)]
