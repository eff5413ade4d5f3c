"""A stream's value: what is written is what is read, and what is damaged is never stepped."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from service.state import LEARNER, TOKEN, Origin, StateCodec, event_key

MODEL = 0xFEEDFACECAFEBEEF


@pytest.fixture
def codec() -> StateCodec:
    return StateCodec(features=3, state_size=10, model=MODEL)


def some_rows(codec: StateCodec, count: int) -> np.ndarray:
    rows = codec.fresh(count)
    rng = np.random.default_rng(1)
    rows["vector"] = rng.normal(size=rows["vector"].shape)
    rows["version"] = np.arange(count) + 1
    rows["last"]["x"] = rng.normal(size=rows["last"]["x"].shape)
    rows["last"]["timestamp"] = 1e9
    return rows


def values_of(codec: StateCodec, rows: np.ndarray) -> list[bytes]:
    return [bytes(value) for value in codec.encode(rows)]


def test_what_is_encoded_is_decoded(codec: StateCodec) -> None:
    rows = some_rows(codec, 5)
    values = values_of(codec, rows)
    loaded = codec.decode(values)
    assert loaded.rows.tobytes() == rows.tobytes()
    assert (loaded.origins == Origin.STORED).all()
    assert loaded.tokens == [value[TOKEN] for value in values]


def test_a_learner_is_stored_only_while_the_flag_says_so(codec: StateCodec) -> None:
    rows = some_rows(codec, 3)
    rows["learner"][1], rows["flags"][1] = 5, LEARNER
    values = values_of(codec, rows)
    assert [len(value) - codec.bytes for value in values] == [-80, 4 * 10, -80]
    loaded = codec.decode(values)
    assert loaded.rows.tobytes() == rows.tobytes()
    assert codec.decode([values[1][: codec.bytes], values[0] + bytes(40)]).origins.tolist() == [Origin.CORRUPT] * 2


def test_a_value_of_another_length_is_none_of_ours_though_its_crc_is_right(codec: StateCodec) -> None:
    plain, learning = some_rows(codec, 1), some_rows(codec, 1)
    learning["learner"], learning["flags"] = 5, LEARNER
    [value], [longest] = values_of(codec, plain), values_of(codec, learning)
    cut = [value[:-4], value + bytes(8), longest[: codec.bytes], longest + bytes(400)]
    resealed = [part[:4] + zlib.crc32(part[8:]).to_bytes(4, "little") + part[8:] for part in (*cut, value)]
    assert codec.decode(resealed).origins.tolist() == [Origin.CORRUPT] * 4 + [Origin.STORED]


def test_identities_and_places_in_queues_take_room_only_where_there_are_any(codec: StateCodec) -> None:
    rows = some_rows(codec, 4)
    rows["seen"][1, 7] = rows["seen"][3, 0] = 9
    rows["source"][2:], rows["part"][2:], rows["offset"][2:] = 1, 2, 3
    values = values_of(codec, rows)
    assert [len(value) - codec.bytes for value in values] == [-80, -16, 0, 0]
    loaded = codec.decode(values)
    assert loaded.rows.tobytes() == rows.tobytes()
    assert codec.decode([values[2][:-80], values[1][:-64], values[0] + bytes(80)]).origins.tolist() == [Origin.CORRUPT] * 3


def test_no_states_are_no_values(codec: StateCodec) -> None:
    assert codec.encode(codec.fresh(0)) == []
    assert len(codec.decode([]).rows) == 0


def test_every_commit_has_a_new_token_even_of_the_same_state(codec: StateCodec) -> None:
    rows = some_rows(codec, 2)
    first, second = values_of(codec, rows.copy()), values_of(codec, rows.copy())
    assert len({value[TOKEN] for value in first + second}) == 4


def test_a_missing_value_is_a_new_stream_of_zeros(codec: StateCodec) -> None:
    loaded = codec.decode([None])
    assert loaded.origins[0] == Origin.NEW
    assert loaded.tokens == [b""]
    assert not loaded.rows["vector"].any()
    assert np.isnan(loaded.rows["last"]["timestamp"][0])


def test_no_flipped_bit_goes_unnoticed(codec: StateCodec) -> None:
    value = values_of(codec, some_rows(codec, 1))[0]
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        assert codec.decode([bytes(damaged)]).origins[0] == Origin.CORRUPT


@pytest.mark.parametrize("value", [b"", b"O", b"ON", b"ON\x01", b"x" * 24, b"x" * 5000])
def test_bytes_that_are_no_value_are_corrupt(codec: StateCodec, value: bytes) -> None:
    assert codec.decode([value]).origins[0] == Origin.CORRUPT


def test_a_value_of_another_model_is_recognised(codec: StateCodec) -> None:
    other = StateCodec(features=3, state_size=10, model=MODEL + 1)
    loaded = codec.decode(values_of(other, some_rows(other, 1)))
    assert loaded.origins[0] == Origin.OTHER_MODEL
    assert not loaded.rows["vector"].any()


def test_a_truncated_value_is_corrupt_and_its_neighbours_are_not(codec: StateCodec) -> None:
    good, cut, also_good = values_of(codec, some_rows(codec, 3))
    loaded = codec.decode([good, cut[:-1], also_good])
    assert loaded.origins.tolist() == [Origin.STORED, Origin.CORRUPT, Origin.STORED]
    assert loaded.rows["version"].tolist() == [1, 0, 3]


def test_a_trail_is_read_back_and_a_damaged_one_is_empty(codec: StateCodec) -> None:
    records = some_rows(codec, 4)["last"]
    [blob] = codec.encode_trails(records, [len(records)])
    assert codec.decode_trail(blob).tobytes() == records.tobytes()
    for damaged in (blob[:-1], b"", b"abc", blob[:20] + b"\xff" + blob[21:]):
        assert len(codec.decode_trail(damaged)) == 0
    assert len(StateCodec(features=3, state_size=10, model=MODEL + 1).decode_trail(blob)) == 0, "another file's"


def test_the_identity_of_an_event_is_its_id_or_its_sequence() -> None:
    assert event_key(None, None) == 0
    assert event_key("a", None) == event_key("a", 7) != event_key("b", 7)
    assert event_key(None, 7) != event_key(None, 8)
    assert event_key("#7", None) != event_key(None, 7)
    assert 0 < event_key("a", None) < 2**64


def test_an_id_is_no_sequence_though_it_looks_like_one() -> None:
    assert len({event_key("5", None), event_key("#5", None), event_key(None, 5), event_key("5", 5)}) == 3
