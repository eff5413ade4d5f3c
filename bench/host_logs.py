"""Made logs of four hosts whose streams never end: what is found of what goes wrong there, and how often nothing has gone wrong.

    bastion  logins, sudo, what the internet tries     app  jobs by day and night, a heartbeat every minute
    web      nginx by day and night, a health check    db   checkpoints, WAL archived every quarter of an hour, a backup every night

and on all of them cron, systemd, the kernel, dockerd. Two weeks are learned from; two others are scored as they are, for false alarms, and
with incidents in them, six of each kind: five bursts of lines that come now and then, four single lines that never came, five periodic
lines that stop, and ten or five times all lines for ten minutes or a tenth of them for three hours. An incident is found where an alert
opens in its time; *by chance* is how many of them an alert opens for where they are not. All goes through files, the published model and
the backtest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.table import Table

from bench.report import table
from service import log_backtest
from service.detector import Detector
from service.log_files import LogFormat
from service.policy import Policy
from training.lines import Mining
from training.logfit import LOG_SIZES, LogPlan
from training.logpipeline import LogJob, produce, sessions_of

FORMAT = LogFormat(r"(\S+) \S+ ", "%Y-%m-%dT%H:%M:%S", r"^\S+ (\S+)")
HOSTS = ("bastion", "web", "app", "db")
RATES = (1e-3, 1e-4)
DAY, WEEK = 86400.0, 604800.0
FIRST = datetime(2026, 9, 7, tzinfo=UTC).timestamp()
"""A Monday."""
EACH = 6
"""Incidents of each kind: one a day from the second day on."""
ADMINS = ("ines", "tomas", "yuki")

Rng = np.random.Generator
Lines = list[tuple[float, str]]
"""Seconds, and what is said then."""


@dataclass(frozen=True)
class Incident:
    """Something that goes wrong on a host from `start` to `stop`, seconds."""

    group: str
    kind: str
    host: str
    start: float
    stop: float


@dataclass(frozen=True)
class HostRow:
    """One group of incidents at one asked rate."""

    group: str
    asked: float
    incidents: int
    found: int
    by_chance: int
    kinds: dict[str, int]


@dataclass(frozen=True)
class QuietRow:
    asked: float
    lines: int
    alerts: int
    ratio: float


def _day(seconds: float) -> float:
    """How much is done at a time of the day, 1 on average."""
    return 1 + 0.75 * float(np.sin(2 * np.pi * (seconds / DAY - 0.375)))


def _at_random(rng: Rng, an_hour: float, start: float, stop: float, *, by_day: bool = True) -> list[float]:
    """Moments so often, by day more of them than by night."""
    moments = np.sort(rng.uniform(start, stop, rng.poisson(1.75 * an_hour * (stop - start) / 3600)))
    return [t for t in moments.tolist() if rng.random() * 1.75 < (_day(t) if by_day else 1.0)]


def _every(rng: Rng, period: float, start: float, stop: float, offset: float = 0.0, jitter: float = 1.0) -> list[float]:
    """Moments by the clock, each up to `jitter` seconds late."""
    return [t + jitter * rng.random() for t in np.arange(start + offset, stop, period).tolist()]


def _ip(rng: Rng) -> str:
    return ".".join(str(part) for part in rng.integers(1, 255, 4))


def _pid(rng: Rng) -> int:
    return int(rng.integers(400, 60000))


def _cron(rng: Rng, t: float, command: str) -> Lines:
    pid = _pid(rng)
    said = (
        "pam_unix(cron:session): session opened for user root by (uid=0)",
        f"(root) CMD ({command})",
        "pam_unix(cron:session): session closed for user root",
    )
    return [(t + 0.02 * i, f"CRON[{pid}]: {text}") for i, text in enumerate(said)]


def _sudo(rng: Rng, t: float, user: str, command: str) -> Lines:
    return [
        (t, f"sudo: {user} : TTY=pts/{rng.integers(0, 4)} ; PWD=/home/{user} ; USER=root ; COMMAND={command}"),
        (t + 0.01, f"sudo: pam_unix(sudo:session): session opened for user root by {user}(uid=0)"),
        (t + rng.exponential(3.0), "sudo: pam_unix(sudo:session): session closed for user root"),
    ]


def _login(rng: Rng, t: float) -> Lines:
    user, pid, port = str(rng.choice(ADMINS)), _pid(rng), int(rng.integers(1024, 65535))
    end = t + float(rng.exponential(1200.0))
    return [
        (t, f"sshd[{pid}]: Accepted publickey for {user} from {_ip(rng)} port {port} ssh2"),
        (t + 0.02, f"sshd[{pid}]: pam_unix(sshd:session): session opened for user {user} by (uid=0)"),
        (end, f"sshd[{pid}]: pam_unix(sshd:session): session closed for user {user}"),
    ]


def _failed(rng: Rng, t: float, user: str) -> Lines:
    return [(t, f"sshd[{_pid(rng)}]: Failed password for {user} from {_ip(rng)} port {rng.integers(1024, 65535)} ssh2")]


def _invalid(rng: Rng, t: float) -> Lines:
    user, ip = str(rng.choice(("admin", "test", "oracle", "ubuntu", "git"))), _ip(rng)
    pid = _pid(rng)
    return [
        (t, f"sshd[{pid}]: Invalid user {user} from {ip} port {rng.integers(1024, 65535)}"),
        (t + 1.5, f"sshd[{pid}]: Failed password for invalid user {user} from {ip} port {rng.integers(1024, 65535)} ssh2"),
        (t + 1.6, f"sshd[{pid}]: Connection closed by invalid user {user} {ip} port {rng.integers(1024, 65535)} [preauth]"),
    ]


def _nginx(rng: Rng, t: float) -> Lines:
    path = str(rng.choice(("/", "/cart", "/api/items", "/login", "/static/app.js")))
    status = int(rng.choice((200, 304, 404, 500), p=(0.86, 0.1, 0.037, 0.003)))
    return [(t, f'nginx: {_ip(rng)} "GET {path} HTTP/1.1" status={status} bytes={rng.integers(200, 90000)} rt={rng.gamma(2, 0.02):.3f}')]


def _job(rng: Rng, t: float) -> Lines:
    number, took = int(rng.integers(10**5, 10**6)), float(rng.gamma(3, 0.4))
    lines = [(t, f"worker: job {number} started"), (t + took, f"worker: job {number} finished in {1000 * took:.0f} ms")]
    return lines if rng.random() > 0.02 else [*lines[:1], (t + took, f"worker: job {number} will be retried: connection reset by peer")]


def _service(t: float, unit: str, what: str) -> Lines:
    return [(t, f"systemd[1]: Starting {what}..."), (t + 2, f"systemd[1]: {unit}: Succeeded."), (t + 2, f"systemd[1]: Finished {what}.")]


def _traffic(rng: Rng, host: str, start: float, stop: float) -> Lines:
    """What people and the internet make a host say."""
    kinds: dict[str, list[tuple[float, Callable[[Rng, float], Lines]]]] = {
        "bastion": [(2.0, _login), (9.0, _invalid), (3.0, lambda r, t: _failed(r, t, "root"))],
        "web": [(55.0, _nginx)],
        "app": [(20.0, _job)],
        "db": [(3.0, lambda r, t: [(t, f"postgres[{_pid(r)}]: LOG: duration: {r.gamma(2, 900):.1f} ms statement: SELECT * FROM orders")])],
    }
    return [line for often, say in kinds[host] for t in _at_random(rng, often, start, stop) for line in say(rng, t)]


def _usual(rng: Rng, host: str, start: float, stop: float) -> Lines:
    """What a host says whatever people do."""
    lines = [line for t in _every(rng, 3600, start, stop, 1020) for line in _cron(rng, t, "cd / && run-parts --report /etc/cron.hourly")]
    lines += [line for t in _every(rng, DAY, start, stop, 23100, 5) for line in _cron(rng, t, "test -x /usr/sbin/anacron")]
    lines += [line for t in _every(rng, DAY, start, stop, 0, 5) for line in _service(t, "logrotate.service", "Rotate log files")]
    for t in _every(rng, DAY / 2, start, stop, 22000, 12000):
        lines += _service(t, "apt-daily.service", "Daily apt download activities")
    lines += [
        (t, f"dhclient[612]: DHCPACK of 10.0.0.{HOSTS.index(host) + 5} from 10.0.0.1") for t in _every(rng, 1800, start, stop, 400, 240)
    ]
    rare = (
        ("kernel: [{n}.{m}] eth0: Link is Up - 10Gbps/Full - flow control rx/tx", 0.02),
        ("kernel: [{n}.{m}] TCP: request_sock_TCP: Possible SYN flooding on port 443. Sending cookies.", 0.02),
        ("kernel: [{n}.{m}] blk_update_request: I/O error, dev sdb, sector {n}", 0.02),
        ("dockerd[812]: health check for container {m} timed out", 0.1),
        ("chronyd[501]: Selected source 10.0.0.{m}", 0.1),
        ("systemd-logind[498]: New session {n} of user ines.", 0.3),
        ("systemd-resolved[455]: Server returned error NXDOMAIN, mitigating potential DNS violation", 0.2),
    )
    for text, often in rare:
        moments = _at_random(rng, often, start, stop, by_day=False)
        lines += [(t, text.format(n=rng.integers(10**4, 10**6), m=rng.integers(1, 200))) for t in moments]
    for t in _at_random(rng, 0.5, start, stop):
        lines += _sudo(
            rng, t, str(rng.choice(ADMINS)), str(rng.choice(("/usr/bin/apt update", "/usr/bin/systemctl restart app", "/bin/ls")))
        )
    if host == "web":
        lines += [(t, "healthcheck: upstream app:8000 is up") for t in _every(rng, 300, start, stop, 11, 3)]
    if host == "app":
        lines += [(t, f"worker: heartbeat queue={rng.poisson(4)}") for t in _every(rng, 60, start, stop, 7, 1.5)]
    if host == "db":
        for t in _every(rng, 300, start, stop, 30, 2):
            lines += [(t, "postgres[701]: LOG: checkpoint starting: time")]
            lines += [(t + rng.uniform(20, 200), f"postgres[701]: LOG: checkpoint complete: wrote {rng.poisson(300)} buffers")]
        lines += [
            (t, f"wal-archive: archived {int(t) // 900:024X} in {rng.gamma(4, 0.3):.1f} s") for t in _every(rng, 900, start, stop, 77, 20)
        ]
        for t in _every(rng, DAY, start, stop, 7800, 60):
            lines += [
                (t, "backup: base backup started"),
                (t + rng.uniform(1500, 2700), f"backup: base backup done, {rng.integers(40, 60)} GB"),
            ]
    return lines


def _burst(rng: Rng, kind: str, t: float) -> Lines:
    """Lines that each come now and then."""
    if kind == "failed logins":
        return [line for u in t + np.sort(rng.uniform(0, 140, 200)) for line in _failed(rng, float(u), "root")]
    if kind == "unknown users":
        return [line for u in t + np.sort(rng.uniform(0, 140, 70)) for line in _invalid(rng, float(u))]
    if kind == "sudo":
        return [line for u in t + np.sort(rng.uniform(0, 300, 30)) for line in _sudo(rng, float(u), "ines", "/bin/ls")]
    if kind == "I/O errors":
        say = "kernel: [{n}.7] blk_update_request: I/O error, dev sdb, sector {n}"
        return [(float(u), say.format(n=rng.integers(10**4, 10**6))) for u in t + np.sort(rng.uniform(0, 60, 60))]
    say = "kernel: [{n}.7] TCP: request_sock_TCP: Possible SYN flooding on port 443. Sending cookies."
    return [(float(u), say.format(n=rng.integers(10**4, 10**6))) for u in t + np.sort(rng.uniform(0, 60, 100))]


SINGLE = {
    "miner": "sudo: tomas : TTY=pts/1 ; PWD=/tmp ; USER=root ; COMMAND=/tmp/.x/xmrig -o pool:3333",
    "new user": "useradd[4711]: new user: name=svc, UID=0, GID=0, home=/root, shell=/bin/bash",
    "root login": "sshd[999]: Accepted password for root from 203.0.113.9 port 4242 ssh2",
    "OOM": "kernel: [88.1] Out of memory: Killed process 4242 (java) total-vm:8123456kB, anon-rss:7123456kB",
}
PERIODIC = {  # what stops, where, for how long
    "heartbeat (1 min)": ("worker: heartbeat", "app", 3600.0),
    "health check (5 min)": ("healthcheck:", "web", 2 * 3600.0),
    "WAL (15 min)": ("wal-archive:", "db", 3 * 3600.0),
    "cron (1 h)": ("cron.hourly", "bastion", 6 * 3600.0),
    "backup (1 day)": ("backup: base backup done", "db", 26 * 3600.0),
}
VOLUME = {"ten times": (10.0, 600.0), "five times": (5.0, 600.0), "a tenth": (0.1, 3 * 3600.0)}
HOSTS_SET = "hosts"
GROUPS, QUIET = ("bursts", "single", "missing", "volume"), "quiet"


def _incidents(rng: Rng, group: str, start: float) -> list[Incident]:
    """EACH of every kind of a group, some hours apart on a host."""
    kinds = {
        "bursts": dict.fromkeys(("failed logins", "unknown users", "sudo", "I/O errors", "SYN flood"), 600.0),
        "single": dict.fromkeys(SINGLE, 600.0),
        "missing": {kind: seconds for kind, (_, _, seconds) in PERIODIC.items()},
        "volume": {kind: seconds for kind, (_, seconds) in VOLUME.items()},
    }[group]
    found = []
    for day in range(EACH):
        for i, (kind, seconds) in enumerate(kinds.items()):
            begin = start + DAY * (2 + 2 * day) + 4.5 * 3600 * i + float(rng.uniform(0, 1800))
            host = PERIODIC[kind][1] if group == "missing" else HOSTS[(i + day) % 4]
            if group == "missing" and seconds > DAY:
                begin = start + DAY * (3 + 2 * day)
            found.append(Incident(group, kind, host, begin, begin + seconds))
    return found


def _with(rng: Rng, lines: Lines, incident: Incident) -> Lines:
    """The lines of a host with this incident in them."""
    start, stop, kind = incident.start, incident.stop, incident.kind
    if incident.group == "bursts":
        return lines + _burst(rng, kind, start)
    if incident.group == "single":
        return [*lines, (start, SINGLE[kind])]
    if incident.group == "missing":
        what = PERIODIC[kind][0]
        gone = {text.partition(":")[0] for t, text in lines if start <= t < stop and what in text} if kind.startswith("cron") else set()
        return [(t, text) for t, text in lines if not (start <= t < stop and (what in text or text.partition(":")[0] in gone))]
    times, seconds = VOLUME[kind]
    if times > 1:  # all that the host says, so many times as fast
        more = start + (times - 1) * seconds
        usual = _usual(rng, incident.host, start, more) + _traffic(rng, incident.host, start, more)
        return lines + [(start + (t - start) / (times - 1), text) for t, text in usual]
    return [(t, text) for t, text in lines if not start <= t < stop or rng.random() < times]


def lines_of(seed: int, start: float, incidents: Sequence[Incident], copy: str = "") -> list[tuple[float, str, str]]:
    """Two weeks of all hosts with these incidents: seconds, host and `copy`, what is said."""
    every: list[tuple[float, str, str]] = []
    for i, host in enumerate(HOSTS):
        rng = np.random.default_rng([seed, i])
        lines = _usual(rng, host, start, start + 2 * WEEK) + _traffic(rng, host, start, start + 2 * WEEK)
        for j, incident in enumerate(incidents):
            if incident.host == host:
                lines = _with(np.random.default_rng([seed, i, j]), lines, incident)
        every += [(t, host + copy, text) for t, text in lines]
    return every


def written(path: Path, lines: Sequence[tuple[float, str, str]]) -> Path:
    """A file of lines in order of time."""
    stamp = "%Y-%m-%dT%H:%M:%S"
    path.write_text("".join(f"{datetime.fromtimestamp(t, UTC).strftime(stamp)} {host} {text}\n" for t, host, text in sorted(lines)))
    return path


def learned(folder: Path, steps: int, seed: int) -> Detector:
    """A published model of two weeks."""
    folder.mkdir(parents=True, exist_ok=True)
    sessions, templates = sessions_of([written(folder / "learned.log", lines_of(1, FIRST, ()))], FORMAT, Mining(), None)
    plan = replace(LogPlan(seed=seed), steps=steps)
    job = LogJob("hosts", "1", sessions, templates, LOG_SIZES, plan, "python -m bench.logs", "learned.log")
    return Detector.load(produce(job, folder / "model"))


def host_rows(steps: int, seed: int = 0) -> tuple[list[QuietRow], list[HostRow]]:
    """Learn, publish, score."""
    with tempfile.TemporaryDirectory() as made:
        return scored(learned(Path(made), steps, seed), Path(made))


def scored(detector: Detector, folder: Path) -> tuple[list[QuietRow], list[HostRow]]:
    """What a published model finds: the same two weeks as they are, and with the incidents of each group, side by side."""
    start = FIRST + 2 * WEEK
    incidents = {group: _incidents(np.random.default_rng(number), group, start) for number, group in enumerate(GROUPS)}
    copies = [lines_of(2, start, some, f".{copy}") for copy, some in {QUIET: [], **incidents}.items()]
    path = written(folder / "scored.log", [line for copy in copies for line in copy])
    calm, rows = [], []
    for asked in RATES:
        _, told = log_backtest.run([path], detector, Policy(alpha=asked), folder / "scores", FORMAT)
        alerts: dict[str, list[float]] = {}
        for row in told:
            alerts.setdefault(str(row[1]), []).append(datetime.fromisoformat(str(row[0])).timestamp())
        number = sum(len(alerts.get(f"{host}.{QUIET}", ())) for host in HOSTS)
        calm.append(QuietRow(asked, len(copies[0]), number, number / len(copies[0]) / asked))
        for group, some in incidents.items():
            kinds = dict.fromkeys((one.kind for one in some), 0)
            for one in some:
                kinds[one.kind] += _within(one, alerts.get(f"{one.host}.{group}", ()))
            chance = sum(_within(one, alerts.get(f"{one.host}.{QUIET}", ())) for one in some)
            rows.append(HostRow(group, asked, len(some), sum(kinds.values()), chance, kinds))
    return calm, rows


def _within(incident: Incident, alerts: Sequence[float]) -> bool:
    """What is missing, or came behind many others, is told of by the next lines: half an hour is given for them."""
    return any(int(incident.start) <= t < incident.stop + 1800 for t in alerts)


def host_tables(calm: Sequence[QuietRow], rows: Sequence[HostRow]) -> list[Table]:
    quiet = table("Two weeks of four made hosts, nothing wrong", ("asked",), ("lines", "alerts", "alerts ÷ asked"))
    for one in calm:
        quiet.add_row(f"{one.asked:g}", f"{one.lines:,}", str(one.alerts), f"{one.ratio:.2f}")
    found = table("Incidents in them, found", ("group", "asked", "kinds"), ("incidents", "found", "by chance"))
    for row in rows:
        kinds = ", ".join(f"{kind} {number}" for kind, number in row.kinds.items())
        found.add_row(row.group, f"{row.asked:g}", kinds, str(row.incidents), str(row.found), str(row.by_chance))
    return [quiet, found]
