import errno
import pickle
from pathlib import Path

import pytest

from tuneloom.errors import InvalidFile
from tuneloom.store.base import StoreRefused
from tuneloom.train.failure import NotFinite, describe


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidFile("line 3: bad", param="training_file"), "invalid_training_file"),
        (NotFinite("no number"), "loss_not_finite"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"), "out_of_memory"),
        (ValueError("odd"), "internal_error"),
    ],
)
def test_each_end_has_one_code_and_a_sentence(tmp_path: Path, error: Exception, code: str) -> None:
    described = describe(error, tmp_path)
    assert described.code == code
    assert described.message.endswith((".", "bad", "number", "odd"))


def test_what_a_store_says_to_its_operator_is_in_the_log_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = describe(StoreRefused("Grant a role on the bucket `secret`."), tmp_path)
    assert (described.code, "secret" in described.message) == ("store_unavailable", False)
    assert "secret" in caplog.text


def test_the_errors_cross_processes() -> None:
    assert pickle.loads(pickle.dumps(NotFinite("gone"))).code == "loss_not_finite"
