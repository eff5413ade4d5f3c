"""The one knob: a false-alarm rate per event, or per stream and week at a stated cadence."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.asking import WRITTEN_BACK
from service.settings import Settings, unknown


def test_a_rate_for_people_becomes_a_rate_per_event() -> None:
    assert Settings(false_alarms="1 per week", cadence_seconds=300).asked_alpha == pytest.approx(1 / 2016)
    assert Settings(false_alarms="0.5 per day", cadence_seconds=60).asked_alpha == pytest.approx(0.5 / 1440)
    assert Settings(false_alarms="1 per year", cadence_seconds=60).asked_alpha == pytest.approx(1 / (365 * 1440))
    assert Settings(alpha=2e-3).asked_alpha == 2e-3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"false_alarms": "1 per week"}, "ONSET_CADENCE_SECONDS"),
        ({"false_alarms": "weekly", "cadence_seconds": 60}, "reads like"),
        ({"false_alarms": "1 per hour", "cadence_seconds": 3600}, "1 false alarms per event"),
    ],
)
def test_a_rate_that_means_nothing_is_refused_by_name(given: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(given)
    (error,) = caught.value.errors()
    assert error["loc"] == ("false_alarms",)
    assert said in error["msg"]


def test_a_misspelt_variable_is_told_with_the_setting_it_is_most_like() -> None:
    given = {"ONSET_ALERTS_WEBHOOK_URL": "x", "ONSET_SERVICE_HOST": "10.0.0.1", "ONSET_ALPHA": "0.01", "onset_alfa": "1", "PATH": "/bin"}
    assert unknown(given) == {"ONSET_ALERTS_WEBHOOK_URL": "ONSET_ALERTS_WEBHOOK", "ONSET_SERVICE_HOST": None}


def test_settings_that_name_no_metrics_to_write_back_import_nothing_of_the_service_for_them() -> None:
    """The embedded store is launched once they are read, and reads its data while the rest is imported."""
    code = "import sys; from service.settings import Settings; Settings(); print('service.names' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
    assert subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip() == "False"
    assert set(Settings().remote_write_metrics.split(",")) <= set(WRITTEN_BACK)
    with pytest.raises(ValidationError, match="it has 'yhut'"):
        Settings(remote_write_metrics="yhat,yhut")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ONSET_PUBLIC_URL": "onset.example.org"}, "ONSET_PUBLIC_URL or its option is 'onset.example.org': it is an address"),
        ({"ONSET_PUBLIC_URL": "https://onset.example.org/?page=1"}, "without a query"),
        ({"ONSET_INSTANCE": "pod a"}, "ONSET_INSTANCE or its option is 'pod a': it is one word"),
        ({"ONSET_ALERTS_KEEP_FIRING_SECONDS": "inf"}, "less than or equal to 86400"),
        ({"ONSET_REMOTE_WRITE_HEADERS": "authorization: Bearer hush"}, "ONSET_REMOTE_WRITE_HEADERS cannot be used: it is not JSON"),
        ({"ONSET_REMOTE_WRITE_HEADERS": '{"a b": "hush"}'}, "names and values of headers"),
        ({"ONSET_REMOTE_WRITE_HEADERS": '{"a": {"b": "hush"}}'}, "ONSET_REMOTE_WRITE_HEADERS cannot be used"),
        ({"ONSET_ALERTS_ALERTMANAGERS": "http://alertmanager:90933"}, "ONSET_ALERTS_ALERTMANAGERS has 'http://alertmanager…': Port out of"),
        ({"ONSET_REMOTE_WRITE_URL": "http://prometheus:90990/"}, "ONSET_REMOTE_WRITE_URL has 'http://prometheus…': Port out of"),
        ({"ONSET_STATE_TTL_SECONDS": "99999999999999999999"}, "ONSET_STATE_TTL_SECONDS or its option is '99999999999999999999'"),
        ({"ONSET_DRAIN_SECONDS": "inf"}, "ONSET_DRAIN_SECONDS or its option is 'inf'"),
        ({"ONSET_CONSOLE_BYTES": str(2**40)}, "ONSET_CONSOLE_BYTES is 1099511627776"),
        ({"ONSET_COPIES_BYTES": str(2**40)}, "ONSET_COPIES_BYTES is 1099511627776"),
        (
            {"ONSET_REMOTE_WRITE_URL": "tcp://anna:hush@prometheus/"},
            "ONSET_REMOTE_WRITE_URL has 'tcp://prometheus…', which is no http:// or https:// address",
        ),
        (
            {"ONSET_PUBLIC_URL": "https://anna:hu/hush@onset/?x=1"},
            "ONSET_PUBLIC_URL or its option is 'https://…@onset/?x=1': it is",
        ),
    ],
)
def test_a_value_that_cannot_be_used_stops_the_service_with_a_sentence_that_names_it_and_no_secret(
    given: dict[str, str], said: str, tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ONSET_")}
    environment |= {"ONSET_PORT": "0", "ONSET_DATA_DIR": str(tmp_path / "data")} | given
    ended = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**37, 2**37)),  # of the machine's memory the test knows nothing
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("onset: ")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "hush" not in ended.stderr
