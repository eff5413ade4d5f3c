"""OpenTelemetry's own SDK exports log records into a real service: each is scored once, though the service is killed in between."""

from __future__ import annotations

import time
from pathlib import Path

from opentelemetry._logs import LogRecord
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource

from tests import local
from tests.e2e.process import Service
from tests.log_doors import LINES
from tests.tiny_log import build_tiny_log

RECORDS = 600


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
