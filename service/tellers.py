"""From the settings (ONSET_ALERTS_…) to the sinks that the desk tells of alerts. Part of the composition root."""

from __future__ import annotations

import time
from collections.abc import Callable

from service.desk import Sink
from service.errors import BadSetting
from service.metrics import Metrics
from service.settings import Settings
from service.sinks.alertmanager import Alertmanager
from service.sinks.posting import address
from service.sinks.stdout import Stdout
from service.sinks.teller import Patience, Teller
from service.sinks.webhook import Webhook
from service.stores.book import Book


def declared(settings: Settings, book: Book, metrics: Metrics, clock: Callable[[], float] = time.time) -> list[Sink]:
    """All sinks of these settings; `clock` gives seconds since 1970. Raises BadSetting."""
    sinks: list[Sink] = [
        Alertmanager(
            _base("ONSET_ALERTS_ALERTMANAGERS", url.strip()),
            book,
            metrics,
            public_url=settings.public_url,
            runbook_url=settings.alerts_runbook_url,
            resend=settings.alerts_resend_seconds,
            keep_firing=settings.alerts_keep_firing_seconds,
            clock=clock,
        )
        for url in settings.alerts_alertmanagers.split(",")
        if url.strip()
    ]
    told_one_by_one: list[Webhook | Stdout] = [Stdout()] if settings.alerts_stdout else []
    if settings.alerts_webhook:
        told_one_by_one.append(Webhook(address("ONSET_ALERTS_WEBHOOK", settings.alerts_webhook.strip()), _secret(settings), clock))
    patience = Patience(give_up=settings.alerts_give_up_seconds)
    sinks += [
        Teller(
            sink,
            book,
            metrics,
            public_url=settings.public_url,
            least=settings.alerts_least_severity,
            per_minute=settings.alerts_per_minute,
            patience=patience,
            clock=clock,
        )
        for sink in told_one_by_one
    ]
    names = [sink.name for sink in sinks]
    if len(set(names)) < len(names):
        raise BadSetting("ONSET_ALERTS_ALERTMANAGERS names the same Alertmanager twice.")
    metrics.begin(sink=names)
    return sinks


def _secret(settings: Settings) -> str:
    """What the webhook's requests are signed with."""
    secret, file = settings.alerts_webhook_secret.get_secret_value(), settings.alerts_webhook_secret_file
    if file is None:
        return secret
    if secret:
        raise BadSetting("ONSET_ALERTS_WEBHOOK_SECRET and ONSET_ALERTS_WEBHOOK_SECRET_FILE are both set: one of them.")
    try:
        secret = file.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise BadSetting(f"ONSET_ALERTS_WEBHOOK_SECRET_FILE '{file}' cannot be read: {error}.") from error
    if not secret:
        raise BadSetting(f"ONSET_ALERTS_WEBHOOK_SECRET_FILE '{file}' is empty: requests would not be signed.")
    return secret


def _base(setting: str, url: str) -> str:
    """What a path is put behind."""
    if "?" in url or "#" in url:
        raise BadSetting(f"{setting} has an address with a query ('?') or a fragment ('#'): a path comes behind it.")
    return address(setting, url)
