"""The service, module by module, by the way that an event takes.

    it comes     api           HTTP ◄─ intake (limits), bodies, packed, arrow, problems (errors as replies), openapi, writing (to sockets)
                 remote_write  Prometheus ◄─ prompb (the message), names and relabel (series → stream)
                 loki, otlp    log shippers ◄─ lokipush, otlplogs (the messages), shipped (what both do); wire (protobuf)
                 otlp          OpenTelemetry's metrics ◄─ otlpmetrics, samples (as remote_write); otlpwire (what its messages share)
                 consumer      queues ◄─ sources/, mapping (message → event)
                 http_sources  who else speaks HTTP ◄─ mapping, lineprotocol (InfluxDB's lines)
    is an event  events, features (→ numbers), lines (a log line → its template's code)
    waits        reorder, batcher
    is scored    scorer        THE FLOW of a batch; copies, claims (is our model file in force?)
                 rounds        ◄─ order (duplicates, late ones), detector (ONNX) ◄─ artifact, policy (p-value → verdict)
    is stored    state (a stream's value), stores/
    is answered  results, ordinary (the usual reply, made faster)
    and told     feed          ─► console/, fleet, series, patterns, sinks/remote_write
                 alerts        ─► desk (keeps the book of them) ─► sinks/; mutes (of which nobody is told for a while)

    beside it    streams (asked and done about single ones) ◄─ lessons (what an accepted alert that is over teaches)
                 silence and sessions (what does not come; cadence), canary, control (α)
    it starts    __main__ ─► app, the composition root ◄─ settings, queues, tellers; embedded (our own valkey-server), logs, memory
    no server    backtest, log_backtest ─► report ◄─ sketch; replay, demo; split; terminal
                 files: tables, long_tables, log_files, sentinels (what is no reading); outputs (what commands write)
    anywhere     errors, refusals (what a Redis refuses), metrics, tracing, tasks, asking (what may be asked for)

Who may import whom is in pyproject.toml, and `make check` looks that nobody else does.
"""

import os

# ONNX Runtime's Linux wheels keep telemetry in a database in ~/.cache, with threads that upload it to their maker, from the import on.
# Nothing of a self-hosted service is to leave it; and a process that has threads and an open database cannot be forked safely.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
