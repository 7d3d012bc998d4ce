from tests.control.conftest import add_job
from tests.control.test_reconcile import World
from tuneloom.control.check import CheckReport, Note, Problem
from tuneloom.domain import JobError
from tuneloom.store import Store


def test_what_the_check_notes_of_good_files_is_in_the_history_with_its_numbers(store: Store):
    world = World(store)
    sizes = Note(level="info", message="Training file: 12 rows, 120 tokens", data={"rows": 12})
    cut = Note(level="warn", message="Training file: 1 row is cut", data={"long_rows": 1})
    world.checker.report = CheckReport(ok=True, rows=12, tokens=120, notes=[sizes, cut])
    job = add_job(store)
    world.tick(2)
    assert world.job(job.id).state == "queued"
    events = [stored.value for stored in store.records.events.query({"job_id": job.id})]
    told = [(event.level, event.message, event.data) for event in events]
    assert told[:2] == [("info", sizes.message, {"rows": 12}), ("warn", cut.message, {"long_rows": 1})]
    assert told[-1][1] == "Files validated, moving job to queued state"


def test_bad_files_are_told_by_their_problems_alone(store: Store):
    world = World(store)
    error = JobError(code="invalid_training_file", message="It cannot be used.", param="training_file")
    problem = Problem(param="training_file", line=3, message="Not JSON.")
    notes = [Note(level="warn", message="unsaid")]
    world.checker.report = CheckReport(ok=False, error=error, problems=[problem], problem_count=1, notes=notes)
    job = add_job(store)
    world.tick(2)
    assert world.job(job.id).state == "failed"
    assert world.messages(job.id)[0] == "line 3: Not JSON."
    assert "unsaid" not in world.messages(job.id)
