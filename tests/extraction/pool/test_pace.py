"""Deadlines follow the times that other workers have needed, and grow with each worker that was given up."""

from actstore.extraction.pool.pace import ALONE_S, FACTOR, FLOOR_S, START_ALONE_S, START_FLOOR_S, Pace


def test_deadlines_of_segments() -> None:
    pace = Pace()
    assert pace.deadline(0, is_alone=False) == pace.deadline(0, is_alone=True) == ALONE_S
    pace.finished(1.0)
    assert pace.deadline(0, is_alone=False) == FLOOR_S
    assert pace.deadline(0, is_alone=True) == ALONE_S
    pace.finished(100.0)
    pace.finished(2.0)
    assert pace.deadline(0, is_alone=False) == FACTOR * 100.0 > FLOOR_S
    assert pace.deadline(3, is_alone=False) == 8 * FACTOR * 100.0
    assert pace.deadline(1, is_alone=True) == 2 * ALONE_S


def test_who_loads_the_model_again_has_the_time_of_a_start_besides() -> None:
    pace = Pace()
    pace.finished(1.0)  # by other workers, which got the segments after the first
    pace.started(200.0)
    assert pace.deadline(0, is_alone=False, loads_again=True) == FLOOR_S + FACTOR * 200.0
    assert pace.deadline(1, is_alone=True, loads_again=True) == 2 * (ALONE_S + FACTOR * 200.0)


def test_deadlines_of_starts() -> None:
    pace = Pace()
    assert pace.start_deadline(0) == START_ALONE_S
    pace.started(3.0)
    assert pace.start_deadline(0) == START_FLOOR_S
    pace.started(1000.0)
    assert pace.start_deadline(1) == 2 * FACTOR * 1000.0
