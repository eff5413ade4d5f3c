"""OpenTelemetry's own SDK exports log records and metrics into a real service: each is scored once, though it is killed in between."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path

from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from tests import local
from tests.e2e.process import Service
from tests.log_doors import LINES
from tests.tiny import build_tiny
from tests.tiny_log import build_tiny_log

RECORDS, EXPORTS = 600, 40


def test_every_record_of_the_sdk_is_scored_once_though_the_service_is_killed(tmp_path: Path, empty_server: str) -> None:
    (tmp_path / "service").mkdir()
    with Service(tmp_path / "service" / "data", model=build_tiny_log(tmp_path), REDIS_URL=empty_server) as service:
        exporter = OTLPLogExporter(f"{service.url}/v1/logs", timeout=60, compression=Compression.Gzip)
        provider = LoggerProvider(Resource({"service.name": "shop", "host.name": "web-1"}), shutdown_on_exit=False)
        provider.add_log_record_processor(BatchLogRecordProcessor(exporter, schedule_delay_millis=50, max_export_batch_size=40))
        logger, begun = provider.get_logger("shop"), time.time_ns()
        for i in range(RECORDS):
            logger.emit(LogRecord(timestamp=begun + 1_000_000 * i, body=LINES[i % 3]))
            if i == RECORDS // 2:
                time.sleep(0.3)
                service.kill()
                service.start()
        assert provider.force_flush(60_000)
        provider.shutdown()
        seen = local.get(f"{service.url}/v1/streams/shop/web-1").raise_for_status().json()
    assert (seen["state_version"], seen["line"]["template"]) == (RECORDS, "Closed connection from <IP>")


def test_every_point_of_the_sdk_is_scored_once_though_the_service_is_killed(tmp_path: Path, empty_server: str) -> None:
    (tmp_path / "service").mkdir()
    with Service(tmp_path / "service" / "data", model=build_tiny(tmp_path), REDIS_URL=empty_server) as service:

        def restart() -> None:
            service.kill()
            service.start()

        exporter = OTLPMetricExporter(f"{service.url}/v1/metrics", timeout=60, compression=Compression.Gzip)
        reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
        provider = MeterProvider([reader], Resource({"service.name": "gateway"}), shutdown_on_exit=False)
        meter, restarting = provider.get_meter("plant"), threading.Thread(target=restart)
        oven, pieces = meter.create_gauge("oven.temperature"), meter.create_counter("pieces")
        for i in range(EXPORTS):
            oven.set(200 + i % 3, {"line": 1})
            pieces.add(5)
            if i == EXPORTS // 2:
                restarting.start()
            assert provider.force_flush(60_000)
        restarting.join()
        provider.shutdown()
        seen = [
            local.get(f"{service.url}/v1/streams/{name}").raise_for_status().json()
            for name in ('oven_temperature{job="gateway",line="1"}', 'pieces{job="gateway"}')
        ]
    assert [last["state_version"] for last in seen] == [EXPORTS, EXPORTS]
    assert seen[0]["contributors"][0]["actual"] == 200 + (EXPORTS - 1) % 3
    assert seen[1]["contributors"][0]["actual"] > 0, "a rate"
