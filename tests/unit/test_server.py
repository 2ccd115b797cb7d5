"""The process ``cloud-server serve``: settings, addresses, signals. Its engine is scripted."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import SETTINGS, RunningServer, ScriptedEngine, running

from cloud_server.cli import main
from cloud_server.settings import ServerSettings
from edge_client import Client
from shared.errors import BadInput

SERVE = f"""
import sys, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
from scripted import ScriptedEngine
class Engine(ScriptedEngine):
    load = classmethod(lambda kind, settings: kind(pause=0.3))
    async def close(self): print("closed", flush=True)
sys.modules["cloud_server.engine"] = types.SimpleNamespace(Engine=Engine)
from cloud_server.cli import main
sys.exit(main())
"""


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVE, "serve", "--grpc-port", "0", "--http-port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_it_tells_where_it_listens_in_one_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    told = json.loads(process.stdout.readline())
    assert told["profile"] == "small"
    with urllib.request.urlopen(told["http"] + "/healthz", timeout=5) as response:
        assert response.status == 200
    with Client(told["grpc"], timeout=5) as client:
        assert client.profile().profile == "small"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_finish_and_ends_with_success(
    process: subprocess.Popen[str], number: signal.Signals
) -> None:
    assert process.stdout
    told = json.loads(process.stdout.readline())
    with Client(told["grpc"], timeout=5) as client:
        events = client.stream([], "what?")
        next(events)
        process.send_signal(number)
        *_, reply = events
        assert not isinstance(reply, str)
        assert reply.text == "a dog runs"
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "closed\n", "")


@pytest.mark.parametrize("port", ["grpc_port", "http_port"])
def test_a_port_that_is_taken_is_named(port: str) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        settings = replace(SETTINGS, **{port: taken.getsockname()[1]})
        flag = "--" + port.replace("_", "-")
        with (
            pytest.raises(BadInput, match=rf"cannot listen on 127.0.0.1:{taken.getsockname()[1]}.*{flag}"),
            running(ScriptedEngine(), settings),
        ):
            pass


def test_two_servers_do_not_share_a_port(server: RunningServer) -> None:
    settings = replace(SETTINGS, grpc_port=int(server.grpc.split(":")[1]))
    with pytest.raises(BadInput, match="already in use"), running(ScriptedEngine(), settings):
        pass


@pytest.mark.parametrize(
    ("field", "value"), [("grpc_port", 65536), ("http_port", -1), ("max_request_bytes", 0), ("threads", -1)]
)
def test_settings_without_meaning_are_refused(field: str, value: int) -> None:
    with pytest.raises(BadInput, match=f"{field} is {value}"):
        ServerSettings(**{field: value})


def test_bad_settings_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--grpc-port", "70000"]) == 2
    assert capsys.readouterr().err == "cloud-server: grpc_port is 70000; a port is between 0 and 65535\n"


def test_every_setting_is_a_flag_with_its_default_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    for name, value in vars(ServerSettings()).items():
        assert f"--{name.replace('_', '-')} " in out
        assert f"(default: {value})" in out
