"""Processes and machines are lost in mid-run; the others continue from the last state, and no row is lost or repeated.

The first two tests have no clock in them: processes are lost and started again at given steps, as torchrun would do it.
The long ones run torchrun itself. Its agents are machines: two on one host, or one on each of two network namespaces
that a cable joins. When an agent counts as lost depends on how busy the machine is, so they are not in `make test`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from launch import TORCHRUN, Outcome, command_of, descendants, kill_group, started, wait_until, words_of
from recorded_recipe import main
from test_ranks import assert_each_row_once, assert_same_run

from tests.processes import PATIENCE, end_of, run_ranks, start, start_ranks
from tinylm.files.locks import run_lock

RENDEZVOUS = "last_call_timeout=10,keep_alive_interval=5,keep_alive_max_attempt=12,join_timeout=600,read_timeout=60"
"""How torchrun's agents meet, in seconds: 10 until a smaller group starts, and 60 of silence (its default is 15) until
an agent counts as lost. On a busy machine agents were silent for three.
"""
PROCESS_TIMEOUT = 60
"""The run's `--timeout`: seconds of silence until a process counts as lost."""


def elastic_words(pretrain_words: list[object]) -> list[object]:
    words = [*pretrain_words, "--optimizer", "adamw", "--batch_size", 4, "--save_interval", 3]
    return [*words, "--timeout", PROCESS_TIMEOUT]


# --- without a clock -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_whoever_is_left_ends_the_run(alone, pretrain_words, tmp_path):
    """Two processes lose the one that writes, so the other one ends. It starts again alone, as torchrun starts it, and
    is lost in turn. What ends the run has never been restarted: it knows the run by torchrun's id, which is in the
    state. Nobody passes --resume.
    """
    words = words_of("pretrain", tmp_path, elastic_words(pretrain_words))
    ranks = start_ranks(main, [[words]] * 2, tmp_path / "both", LOST_AT="0 7", TORCHELASTIC_RUN_ID="one")
    statuses = [end_of(process, tmp_path / "both" / f"log.{rank}") for rank, process in enumerate(ranks)]
    assert statuses == [-signal.SIGKILL, 1], "the other one has noticed, and has ended by itself"
    again = {"TORCHELASTIC_RUN_ID": "one", "TORCHELASTIC_RESTART_COUNT": "1", "LOST_AT": "0 14"}
    (restarted,) = start_ranks(main, [[words]], tmp_path / "second", **again)
    assert end_of(restarted, tmp_path / "second" / "log.0") == -signal.SIGKILL
    said = run_ranks(main, [[words]], tmp_path / "third", TORCHELASTIC_RUN_ID="one", TORCHELASTIC_RESTART_COUNT="0")
    assert re.search(r"from step (9|12)\b", said), said
    outcome = Outcome(tmp_path / "out", tmp_path / "records")
    worlds = {record["step"]: record["world_size"] for record in outcome.steps()}
    assert worlds[1] == 2 and worlds[14] == 1
    assert_each_row_once(outcome)
    assert_same_run(alone["adamw"], outcome, "adamw")


@pytest.mark.slow
def test_a_restarted_run_waits_for_the_lock_of_a_lost_machine(pretrain_words, tmp_path):
    """A file server gives back the lock of a lost machine late; a run that nobody has restarted is refused at once."""
    words = words_of("pretrain", tmp_path, [*elastic_words(pretrain_words), "--max_steps", 1, "--timeout", 1200])
    lock, told = tmp_path / "out" / ".pretrain.lock", tmp_path / "told"
    holder = start(hold_lock, lock, told, log=tmp_path / "holder")
    wait_until(lambda: told.exists(), PATIENCE, "a lock that another process holds")
    logs = [tmp_path / "first", tmp_path / "restarted"]
    first = start(main, words, log=logs[0])
    assert end_of(first, logs[0]) == 2 and "is in use by another run" in logs[0].read_text()
    restarted = start(main, words, log=logs[1], TORCHELASTIC_RESTART_COUNT="1")
    told.unlink()
    assert [end_of(holder, tmp_path / "holder"), end_of(restarted, logs[1])] == [0, 0], logs[1].read_text()


def hold_lock(lock: Path, told: Path) -> None:
    """Hold a lock, say so with a file, and give the lock back two seconds after somebody has deleted the file."""
    with run_lock(lock):
        told.touch()
        wait_until(lambda: not told.exists(), PATIENCE, "")
        time.sleep(2)


# --- with torchrun ---------------------------------------------------------------------------------------------------


@dataclass
class Machines:
    """Two torchrun agents with a worker each; agent 0 keeps the rendezvous."""

    where: Path
    argv: list[object]
    addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.1")
    prefixes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """What each agent's command is started with."""
    more: dict[str, str] = field(default_factory=dict)
    """More environment variables."""

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.agents: list[subprocess.Popen] = []
        self.outcome = Outcome(self.where / "out", self.where / "records")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Both agents, started; whatever of them is left at the end is killed."""
        with contextlib.ExitStack() as stack:
            for number in (0, 1):
                launcher = [
                    *self.prefixes[number], *TORCHRUN, "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3",
                    "--monitor-interval=0.2", "--rdzv-backend=c10d", "--rdzv-id=elastic-test",
                    f"--rdzv-endpoint={self.addresses[0]}:{self.port}", f"--local-addr={self.addresses[number]}",
                    f"--rdzv-conf={RENDEZVOUS},is_host={'true' if number == 0 else 'false'}",
                ]  # fmt: skip
                command = command_of("pretrain", self.where, self.argv, launcher)
                more = {"SECONDS_PER_STEP": "0.2", "HOST": str(number), **self.more}
                self.agents.append(stack.enter_context(started(command, self.log(number), **more)))
            yield

    def log(self, number: int) -> Path:
        return self.where / f"log{number}"

    def worker(self, number: int) -> int:
        """The process id of an agent's newest worker that has finished a step."""
        return [step["pid"] for step in self.outcome.steps() if step["host"] == str(number)][-1]

    def wait_for_step(self, step: int, processes: int = 2) -> None:
        """Wait until so many processes have finished `step` together."""

        def reached() -> bool:
            records = [(record["world_size"], record["host"]) for record in self.outcome.steps()
                       if record["step"] >= step]  # fmt: skip
            return len({host for size, host in records if size == processes}) == processes

        wait_until(reached, PATIENCE, f"step {step} on {processes} processes; {self.where}")

    def last_step(self) -> int:
        return max(record["step"] for record in self.outcome.steps())


@pytest.mark.long
def test_a_machine_is_lost_and_the_other_one_ends_the_run(alone, pretrain_words, tmp_path):
    machines = Machines(tmp_path, elastic_words(pretrain_words))
    with machines.running():
        machines.wait_for_step(5)
        kill_group(machines.agents[1])
        assert machines.agents[0].wait(PATIENCE) == 0, machines.log(0).read_text()
    worlds = {record["step"]: record["world_size"] for record in machines.outcome.steps()}
    assert worlds[1] == 2 and worlds[max(worlds)] == 1
    assert_each_row_once(machines.outcome)
    assert_same_run(alone["adamw"], machines.outcome, "adamw")


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_worker_is_lost_and_then_a_worker_of_the_other_machine(alone, pretrain_words, tmp_path, sharding):
    """Both machines stay, so all processes are started again and continue from the last state, without --resume."""
    machines = Machines(tmp_path, [*elastic_words(pretrain_words), "--sharding", sharding])
    with machines.running():
        for number, step in ((1, 5), (0, 12)):
            machines.wait_for_step(step)
            os.kill(machines.worker(number), signal.SIGKILL)
        assert [agent.wait(PATIENCE) for agent in machines.agents] == [0, 0], machines.log(0).read_text()
    workers = {record["pid"] for record in machines.outcome.steps()}
    assert len(workers) == 6, "two processes, three times"
    assert_each_row_once(machines.outcome)
    assert_same_run(alone["adamw"], machines.outcome, "adamw")


@pytest.mark.long
def test_a_machine_comes_back(alone, pretrain_words, tmp_path):
    """A machine that joins stops the others after their step, whose state is saved, and all continue together.

    torchrun's own store, which it shares with the processes, does not tell a newcomer where it is: torch 2.13 publishes
    its address in the first round only. So the processes are given one of theirs.
    """
    more = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    machines = Machines(tmp_path, elastic_words(pretrain_words), more=more)
    with machines.running(), contextlib.ExitStack() as stack:
        machines.wait_for_step(4)
        kill_group(machines.agents[1])
        machines.wait_for_step(8, processes=1)
        command = machines.agents[1].args
        more = {**more, "SECONDS_PER_STEP": "0.2", "HOST": "1"}
        again = stack.enter_context(started(command, tmp_path / "log1b", **more))
        machines.wait_for_step(14)
        assert machines.agents[0].wait(PATIENCE) == 0, machines.log(0).read_text()
        assert again.wait(PATIENCE) == 0
    assert_each_row_once(machines.outcome)
    assert_same_run(alone["adamw"], machines.outcome, "adamw")


# --- two hosts, joined by a cable ------------------------------------------------------------------------------------


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None:
        return False
    name = f"tinylm-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return made


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Two network namespaces, joined by a veth pair; gives their names and their addresses, and takes them down."""
    names = (f"tinylm-{os.getpid()}-0", f"tinylm-{os.getpid()}-1")
    # Ranks go by address, and host 1 is to have rank 0, the process that writes: its loss is the harder one.
    addresses = ("10.211.7.2", "10.211.7.1")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
            # How often TCP repeats what is not confirmed: 15 times by default, which takes a quarter of an hour, and
            # so long does a torchrun that is cut off wait for an answer from the rendezvous.
            ip("netns", "exec", name, "sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
        yield names, addresses
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.long
@pytest.mark.skipif(not can_make_namespaces(), reason="needs the right to make network namespaces (ip netns, root)")
def test_a_host_is_cut_off_and_the_other_one_goes_on_alone(alone, pretrain_words, tmp_path):
    """The one that is cut off was the one that writes. It cannot reach the rendezvous, so it ends and writes nothing;
    the other one waits for `--timeout` and for the folder's lock, and ends the run.
    """
    with two_hosts() as (names, addresses):
        machines = Machines(
            tmp_path,
            elastic_words(pretrain_words),
            addresses,
            tuple(("ip", "netns", "exec", name) for name in names),
            {"GLOO_SOCKET_IFNAME": "cable"},
        )
        with machines.running():
            machines.wait_for_step(5)
            assert {r["host"] for r in machines.outcome.steps() if r["rank"] == 0} == {"1"}
            subprocess.run(["ip", "-n", names[1], "link", "set", "cable", "down"], check=True)
            cut_off = machines.last_step()
            assert machines.agents[0].wait(PATIENCE) == 0, machines.log(0).read_text()
            assert machines.agents[1].wait(PATIENCE) != 0
            assert descendants(machines.agents[1].pid) == []
    of_host_1 = [record for record in machines.outcome.steps() if record["host"] == "1"]
    assert {record["world_size"] for record in of_host_1} == {2} and of_host_1[-1]["step"] <= cut_off + 1
    assert_each_row_once(machines.outcome)
    assert_same_run(alone["adamw"], machines.outcome, "adamw")
