"""Files that commands leave: whole or not at all, and refused in words where the disk is full."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from service.__main__ import app
from service.errors import NotWritten
from service.outputs import whole, write_text
from tests.limits import files_of_at_most
from tests.needs import program


def table(path: Path, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(rows).normal(10, 1, rows)
    path.write_text("timestamp,value\n" + "".join(f"{1_700_000_000 + i},{value!r}\n" for i, value in enumerate(values.tolist())))
    return path


def written(path: Path, pieces: Iterable[str]) -> None:
    with whole(path) as place, place.open("w") as file:
        file.writelines(pieces)


def test_a_file_that_could_not_be_finished_is_as_it_was_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("of before")
    with pytest.raises(NotWritten, match=r"scores\.csv cannot be written: File too large\. Make room"), files_of_at_most(1000):
        written(path, "0123456789" * 1000)
    assert path.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_finished_for_another_reason_leaves_nothing_either(tmp_path: Path) -> None:
    def halves() -> Iterator[str]:
        yield "half of it"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "new.csv", halves())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_is_needed_and_what_is_free() -> None:
    with pytest.raises(NotWritten) as caught:
        write_text(Path("/dev/full"), "x" * 3000)
    assert "/dev/full cannot be written: No space left on device. It takes 3,000 bytes. " in caught.value.detail
    assert " bytes are free in /dev. Make room, or give another place." in caught.value.detail


def test_a_place_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWritten, match=r"file.* cannot be written: (File exists|Not a directory)\. Give another place\."):
        write_text(tmp_path / "file" / "scores.csv", "")


def test_what_is_refused_is_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match=r"x{250} cannot be written: File name too long"):
        write_text(tmp_path / ("x" * 250), "")


def test_a_link_leads_to_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "link", "1")
    write_text(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "2"


def test_who_may_read_a_file_that_is_there_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("")
    path.chmod(0o666)
    write_text(path, "new")
    assert path.stat().st_mode & 0o777 == 0o666


WRITES = 'import sys; from pathlib import Path; from service.outputs import write_text; write_text(Path(sys.argv[1]), "new")'
UNPRIVILEGED = """
import os, sys
from pathlib import Path
from service.outputs import write_text
if os.getuid() == 0:
    os.setuid(65534)
write_text(Path(sys.argv[1]), "new")
"""


def test_a_file_in_a_folder_that_takes_no_other_is_written_to_itself() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are not everybody's
        folder, path = Path(name), Path(name) / "scores.json"
        path.write_text("of before")
        path.chmod(0o666)
        folder.chmod(0o555)
        try:
            subprocess.run([sys.executable, "-c", UNPRIVILEGED, str(path)], check=True, timeout=60)
        finally:
            folder.chmod(0o755)
        assert path.read_text() == "new"


def test_a_file_that_is_mounted_by_itself_is_written(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("of before")
    (tmp_path / "inside").write_text("")
    mounted = f"mount --bind {tmp_path}/outside {tmp_path}/inside && exec {sys.executable} -c '{WRITES}' {tmp_path}/inside"
    done = subprocess.run(
        [program("unshare", "util-linux"), "--user", "--map-root-user", "--mount", "sh", "-c", mounted],
        check=False,
        capture_output=True,
        timeout=60,
    )
    if b"unshare" in done.stderr or b"mount:" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outside").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inside", "outside"]


def test_standard_output_may_be_named_and_is_written_to_itself(tmp_path: Path) -> None:
    says = "from pathlib import Path; from service.outputs import write_text; write_text(Path('/dev/stdout'), 'said')"
    with (tmp_path / "out").open("w+") as out:
        subprocess.run([sys.executable, "-c", says], stdout=out, check=True, timeout=60)
        out.seek(0)
        assert out.read() == "said"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_backtest_onto_a_full_disk_names_the_file_and_leaves_no_half_of_one(tmp_path: Path, tiny_model_path: Path) -> None:
    table(tmp_path / "data/small.csv", 20)
    table(tmp_path / "data/large.csv", 3000)
    with files_of_at_most(50_000):
        result = CliRunner().invoke(
            app, ["backtest", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--model", str(tiny_model_path)]
        )
    assert result.exit_code == 2
    assert f"{tmp_path / 'out/large.csv'} cannot be written: File too large" in result.output.replace("\n", "")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_split_onto_a_full_disk_names_its_folder(tmp_path: Path) -> None:
    table(tmp_path / "table.csv", 3000)
    with files_of_at_most(1000):
        result = CliRunner().invoke(app, ["split", str(tmp_path / "table.csv"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "cannot be written: File too large" in result.output.replace("\n", "")
