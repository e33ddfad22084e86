"""Telling clients that a job is over: signed as Standard Webhooks asks, tried again with growing pauses.

https://github.com/standard-webhooks/standard-webhooks.  What is still to be delivered is in the index, so it
survives this process; a receiver that is slow or gone costs the jobs nothing.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from datetime import UTC, datetime
from typing import Any

import requests
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks import Webhook as Signer
from urllib3.exceptions import HTTPError

from pipeline.errors import JobNotFound, PipelineError
from pipeline.job_records import Job, Webhook
from pipeline.job_store import JobStore
from pipeline.runpod_words import status_body
from pipeline.safe_fetch import checked_session

SECONDS = 10.0
"""What a receiver may take to answer."""
PAUSES = (5.0, 30.0, 120.0, 600.0, 3600.0, 6 * 3600.0)
"""Before each further try; after the last one it is given up."""
IDLE_SECONDS = 1.0

log = logging.getLogger(__name__)


class WebhookSender:
    """A thread that delivers what is due."""

    def __init__(self, store: JobStore, pauses: tuple[float, ...] = PAUSES) -> None:
        self._store, self._pauses = store, pauses
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; what is not delivered is delivered by the next one."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                due = self._store.index.due_webhook(2 * SECONDS)
                if due is None:
                    self._stop.wait(IDLE_SECONDS)
                else:
                    self._deliver(due)
            except SQLAlchemyError:
                log.exception("the index can't be used for webhooks")
                self._stop.wait(IDLE_SECONDS)

    def _deliver(self, webhook: Webhook) -> None:
        try:
            job = self._store.index.get(webhook.job)
        except JobNotFound:
            return
        trouble = self._post(job, webhook)
        if trouble is None:
            self._store.index.webhook_done(webhook.id)
        elif webhook.attempts < len(self._pauses):
            self._store.index.webhook_later(webhook.id, self._pauses[webhook.attempts])
            log.warning("webhook: %s; another try follows", trouble, extra={"job": job.id})
        else:
            self._store.index.webhook_done(webhook.id)
            log.error("webhook given up: %s", trouble, extra={"job": job.id})

    def _post(self, job: Job, webhook: Webhook) -> str | None:
        """None when it arrived, else what went wrong."""
        now = datetime.now(UTC)
        headers = {
            "Content-Type": "application/json",
            "webhook-id": webhook.id,
            "webhook-timestamp": str(int(now.timestamp())),
        }
        try:
            body = json.dumps(self._message(job))
            if secret := self._store.settings.webhook_secret:
                headers["webhook-signature"] = signer(secret).sign(webhook.id, now.replace(tzinfo=None), body)
        except (PipelineError, OSError, ValueError) as error:  # its video is gone; a secret that is none
            return f"there is no message: {error}"
        try:
            with (
                checked_session(self._store.settings.allowed) as session,
                session.post(
                    job.extra["webhook"],
                    data=body.encode(),
                    headers=headers,
                    timeout=SECONDS,
                    allow_redirects=False,
                    stream=True,  # nobody reads what it says
                ) as answer,
            ):
                return None if answer.ok else f"the receiver answered {answer.status_code}"
        except (requests.RequestException, HTTPError, ValueError) as error:
            return f"the receiver can't be reached: {error}"

    def _message(self, job: Job) -> dict[str, Any]:
        if job.api == "runpod":
            return status_body(job, self._store)
        ended = datetime.fromtimestamp(job.finished or job.created, UTC).isoformat()
        data = {"id": job.id, "state": job.state, "error": job.error, "result": job.result}
        return {"type": f"job.{job.state}", "timestamp": ended, "data": data}


def signer(secret: str) -> Signer:
    """Of a secret as Standard Webhooks writes it (``whsec_`` and base64), or of any other words."""
    if secret.startswith("whsec_"):
        return Signer(secret)
    return Signer(base64.b64encode(secret.encode()).decode())
