"""The runner: the detached Ray actor that takes jobs from the store and renders them, one after the other.

It holds no state that matters: whatever kills it, another one goes on from the index and the job
directories.  What a job is made of is the driver's business, what a client sees ``pipeline.job_index``'s.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from dataclasses import replace
from typing import Any

import ray

from actors.driver import render
from actors.pool import RendererPool
from pipeline.errors import JobCancelled, PipelineError
from pipeline.job_inputs import resolve
from pipeline.job_index import Job
from pipeline.job_store import JobStore
from pipeline.progress import JobProgress
from pipeline.service_settings import ServiceSettings
from pipeline.settings import Settings
