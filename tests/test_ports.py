"""Ports: the first free one, never one that somebody has."""

import os
import socket
import subprocess
import sys

import pytest

from pipeline.errors import ConfigurationError
from pipeline.ports import reserved_port
from tests.free_ports import free_ports

FIRST, LAST = map(int, free_ports(8).split("-"))


def test_the_first_free_port_is_taken() -> None:
    """Nested reservations get neighbouring ports, and give them back."""
    with reserved_port(FIRST, LAST) as (one, _), reserved_port(FIRST, LAST) as (two, _):
        assert one < two <= LAST
    with reserved_port(FIRST, LAST) as (again, _):
        assert again == one


def test_a_strangers_port_is_left_alone() -> None:
    """A port that anybody listens on is skipped."""
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", FIRST))
        stranger.listen()
        with reserved_port(FIRST, LAST) as (port, _):
            assert port > FIRST


def test_a_lock_lives_as_long_as_the_process_that_inherited_it() -> None:
    """The port stays ours while a child holds the descriptor, although we let go."""
    with reserved_port(FIRST, LAST) as (port, lock):
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, pass_fds=(lock,)
        )
    with reserved_port(FIRST, LAST) as (other, _):
        assert other != port
    child.communicate()
    with reserved_port(FIRST, LAST) as (again, _):
        assert again == port


def test_a_full_range_is_an_error_that_names_the_settings() -> None:
    """No port left: the message says which settings to change."""
    with (
        reserved_port(FIRST, LAST) as (port, lock),
        pytest.raises(ConfigurationError, match="INFINITETALK_PORTS"),
        reserved_port(port, port),
    ):
        os.fstat(lock)
