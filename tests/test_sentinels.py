"""Numbers that stand for no reading, told from readings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from service.sentinels import Place, Sentinels, blank, columns_of, missing_of, of, places


def found(*pieces: Sequence[float]) -> dict[float, list[Place]]:
    sentinels = Sentinels()
    for piece in pieces:
        sentinels.look(["a"], np.array(piece)[:, None])
    return sentinels.found()


READINGS = [50 + i % 9 for i in range(200)]


@pytest.mark.parametrize("number", [-9999, 65535, 1e20, 3.4e38, -3.4028234663852886e38, 0])
def test_what_is_far_from_all_readings_is_found_in_whatever_piece(number: float) -> None:
    assert found([number], READINGS, [number, np.nan]) == {number: [Place("a", 2, 2 / 202, moves=True)]}


@pytest.mark.parametrize(
    "readings",
    [
        [*READINGS, 99, 0.0, 120],  # a range that reaches there
        [*READINGS, *[0.0] * 20],  # a machine that stands
        [0.0, 1.0] * 50,  # a switch
        [*[0.0] * 100, 999, 1000],
        [np.nan] * 9,
        [1.7e18 + i for i in range(50)],
    ],
)
def test_what_is_near_others_or_common_is_a_reading(readings: Sequence[float]) -> None:
    assert found(readings) == {}


def test_they_are_written_as_they_are_read_back() -> None:
    many = found([-9999, -3.4028234663852886e38], READINGS)
    assert missing_of(many) == "--missing -3.4028234663852886e+38 --missing -9999"
    assert places(many) == "-3.4028234663852886e+38 in a (1, 0.5 %); -9999 in a (1, 0.5 %)"


def test_what_a_machine_may_mean_is_no_missing_reading() -> None:
    """Zero, a number that is common (a mode `999` in a fifth of the rows), and a bit that is seldom set."""
    rare, common = found([-9999, 0, 3.4e38], READINGS), found([999.0] * 50, READINGS)
    assert list(of(rare, none=True)) == [-9999, 3.4e38]
    assert list(of(rare, none=False)) == [0]
    assert of(common, none=True) == {}
    assert of(common, none=False) == common
    assert of(found([0.0] * 95, [65535.0] * 5), none=True) == {}
    assert list(of(found([1e30] * 50, READINGS), none=True)) == [1e30]


def test_of_numbers_that_no_unit_has_all_are_left_out_also_those_that_were_not_remembered() -> None:
    values = np.array([1, -9999, 2, 1e31, -3e38, np.nan], np.float32)
    blank(values[:3], [-9999])
    assert np.array_equal(values[:3], [1, np.nan, 2], equal_nan=True)
    blank(values, [1e30])
    assert np.array_equal(values, [1, np.nan, 2, np.nan, np.nan, np.nan], equal_nan=True)


def test_a_column_of_huge_numbers_is_not_remembered_whole() -> None:
    sentinels = Sentinels()
    sentinels.look(["a"], np.geomspace(1e30, 1e38, 1000)[:, None])
    assert len(sentinels.counts["a"]) < 20


def test_streams_of_one_value_are_looked_at_each_by_itself() -> None:
    """What is far from a temperature may be near a count."""
    assert columns_of("a.csv", ["value"]) == ["a.csv"]
    assert columns_of("a.csv", ["load", "heat"]) == ["load", "heat"]
