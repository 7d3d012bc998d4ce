from hypothesis import given
from hypothesis import strategies as st

from tuneloom.store.base import field_path, split_path


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_a_field_path_keeps_its_parts_whatever_they_hold(parts: list[str]) -> None:
    assert split_path(field_path(*parts)) == tuple(parts)


def test_a_plain_field_path_reads_plainly() -> None:
    assert field_path("spec", "metadata", "team") == "spec.metadata.team"
    assert field_path("metadata", "a.b") == "metadata.`a.b`"
