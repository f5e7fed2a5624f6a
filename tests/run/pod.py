"""Processes of one run on this machine, four devices in all, for tests: forked off one process
that has imported everything.

As a program it reads {"commands": [argv, ...], "logs": [path, ...]} from stdin, line by line,
starts steptool_jax.main (or `_exchange`) once for each command, prints the process ids and then the
exit codes. Every process of main keeps what it rolled out in WORKDIR/rolled_<process>.jsonl.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import tiny

_EXCHANGE = "exchange"
_END_S = 240  # below pytest's limit, so that the next test finds an idle pod


class Pod:
  """Starts runs of several processes; a context manager."""

  def __init__(self, processes: int):
    self.processes = processes

  def __enter__(self):
    import fakes

    env = tiny.environment() | fakes.several_devices(4 // self.processes)
    env["PYTHONPATH"] += f"{os.pathsep}{tiny.ROOT / 'tests/run'}"
    self._server = subprocess.Popen(
      [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return self

  def __exit__(self, *_):
    self._server.stdin.close()
    self._server.wait(20)

  def start(self, workdir, *flags, each=None) -> "Run":
    """each: further flags of one process alone."""
    each = each or ((),) * self.processes
    where = _coordinator()
    commands = [
      [
        *tiny.command(workdir, *flags, config=f"{tiny.ROOT}/tests/run/tiny.py:calls")[2:],
        f"--coordinator={where}",
        f"--processes={len(each)}",
        f"--process={n}",
        *own,
      ]
      for n, own in enumerate(each)
    ]
    return self._start(workdir, commands)

  def exchange(self, workdir, count, failing=-1) -> "Run":
    """Processes that do nothing but tell each other numbers; one may fail soon."""
    where = _coordinator()
    return self._start(
      workdir, [[_EXCHANGE, where, str(count), str(n), str(failing)] for n in range(count)]
    )

  def _start(self, workdir, commands) -> "Run":
    workdir.mkdir(exist_ok=True)
    logs = [workdir / f"log_{n}.txt" for n in range(len(commands))]
    request = {"commands": commands, "logs": list(map(str, logs))}
    self._server.stdin.write(json.dumps(request) + "\n")
    self._server.stdin.flush()
    return Run(self._server, logs)


def _coordinator() -> str:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return f"localhost:{free.getsockname()[1]}"


class Run:
  def __init__(self, server, logs):
    self._server, self.logs = server, logs
    self.pids = json.loads(server.stdout.readline())

  def wait(self) -> list[int]:
    """Exit codes; minus the signal of one that was killed. Those that hang are killed."""
    hung = []
    watch = threading.Timer(_END_S, lambda: (hung.append(True), self._kill()))
    watch.start()
    codes = json.loads(self._server.stdout.readline())
    watch.cancel()
    assert not hung, f"no end in {_END_S} s: {[log.read_text()[-2000:] for log in self.logs]}"
    return codes

  def log(self, n) -> str:
    return self.logs[n].read_text()

  def _kill(self) -> None:
    for pid in self.pids:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _serve() -> None:
  import steptool_jax.run.train  # noqa: F401, what every process needs

  for line in sys.stdin:
    request = json.loads(line)
    pids = []
    for argv, log in zip(request["commands"], request["logs"], strict=True):
      pid = os.fork()
      if not pid:
        _run(argv, log)  # ends in SystemExit
      pids.append(pid)
    print(json.dumps(pids), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)


def _run(argv, log) -> None:
  with open(log, "a") as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  if argv[0] == _EXCHANGE:
    _exchange(*argv[1:])
  else:
    _main(argv)


def _exchange(coordinator, count, index, failing) -> None:
  from steptool_jax.run.hosts import hosts, joining

  with joining.joined(coordinator, int(count), int(index)):
    for number in range(2000):
      hosts.gather(number)
      print("exchanged", number, flush=True)
      if number == 5 and index == failing:
        raise ValueError("nothing but trouble")
      time.sleep(0.05)
  sys.exit()


def _main(argv) -> None:
  from steptool_jax import main
  from steptool_jax.data.trajectories import AnnotatedTrajectory, dump
  from steptool_jax.run.hosts import hosts
  from steptool_jax.run.parts import rollouts

  reward = rollouts.reward

  def recording(parts, *args, **options):
    trajectories = reward(parts, *args, **options)
    name = f"rolled_{hosts.peers().index}.jsonl"
    with pathlib.Path(parts.workdir, name).open("a") as file:
      file.writelines(dump(AnnotatedTrajectory(t)) + "\n" for t in trajectories)
    return trajectories

  rollouts.reward = recording
  sys.argv = argv
  main.run()


if __name__ == "__main__":
  _serve()
  os._exit(0)  # with so much imported, the orderly end takes seconds
