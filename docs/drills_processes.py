"""Drills in which processes of a run die, stop or are told to, or in which there are too many."""

import random
import signal
import subprocess
import time
from collections.abc import Iterator

from drills_table import Row
from small_runs import LAYOUTS, Started, Testbed, kill, reach, run_to_end

from alexnet_dist.config.load import configs_folder
from alexnet_dist.data.prepare.prepare import Options, prepare
from alexnet_dist.files import read_run


def kills(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """SIGKILL one rank, all, or the launcher, while the run starts, trains, evaluates or saves."""
    for layout in LAYOUTS:
        row, name = Row("kill", layout), f"killed-{layout}"
        testbed.undisturbed(layout)
        while row.trials < count:
            run = Started(testbed.arguments(layout, name))
            moment = dice.choice(["starting", "step", "step", "saving"])
            reach(run, testbed.folder(name), moment, testbed.saved(name) + dice.randint(1, 7), dice)
            processes = run.processes()
            if run.ended() or not processes:  # it reached its last step
                run.end()
                break
            kill(processes, dice.choice(["all", "launcher", "one"]), dice)
            row.trials += 1
            row.wait_until_gone(run, processes)
            row.lost.append(testbed.lost(name))
            row.recovered += read_run(testbed.folder(name)).get("state") != "finished"
        row.identical = testbed.finish(layout, name)
        yield row


def signals(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """Send each signal to the launcher or a rank, at any moment from the start on."""
    codes = {signal.SIGUSR1: 75, signal.SIGUSR2: 75, signal.SIGTERM: 143, signal.SIGINT: 130}
    for layout in ("one", "columns", "columns_x_replicas"):
        row, name = Row("signal", layout), f"signalled-{layout}"
        testbed.undisturbed(layout)
        while row.trials < count:
            run = Started(testbed.arguments(layout, name))
            time.sleep(dice.uniform(0.2, 6))
            processes = run.processes()
            if run.ended() or not processes:
                run.end()
                break
            number = dice.choice(list(codes))
            # A rank that is still starting has no handler yet, but its launcher has.
            ranks = read_run(testbed.folder(name)).get("pid") in [p.pid for p in processes]
            target = dice.choice(processes) if ranks else processes[0]
            target.send_signal(number)
            begin, row.trials = time.monotonic(), row.trials + 1
            code, _ = run.end()
            row.gone_s.append(time.monotonic() - begin)
            row.left += len([p for p in processes if p.is_running()])
            row.recovered += code in (codes[number], 0)  # 0: it had reached its end
        row.identical = testbed.finish(layout, name)
        yield row


def freezes(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """SIGSTOP a rank: it is named, and the run ends."""
    for layout in ("columns", "columns_x_replicas"):
        row, name = Row("stop a rank", layout), f"frozen-{layout}"
        testbed.undisturbed(layout)
        for _ in range(count):
            run = Started(testbed.arguments(layout, name))
            reach(run, testbed.folder(name), "step", testbed.saved(name) + 2, dice)
            processes = run.processes()
            if len(processes) <= 1:  # it has reached its end
                run.end()
                break
            frozen = dice.choice(processes[1:])
            frozen.suspend()
            begin, row.trials = time.monotonic(), row.trials + 1
            _, output = run.end()
            row.gone_s.append(time.monotonic() - begin - 4)  # less the watchdog's patience
            row.left += len([p for p in processes if p.is_running()])
            row.recovered += f"process {frozen.pid} on" in output and "does not answer" in output
        row.identical = testbed.finish(layout, name)
        yield row


def two_writers(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """A second job on a run folder is refused; a third takes over from one that is dead."""
    row, name = Row("two writers", "columns"), "shared"
    testbed.undisturbed("columns")
    for _ in range(count):
        first = Started(testbed.arguments("columns", name))
        reach(first, testbed.folder(name), "step", testbed.saved(name) + 2, dice)
        processes = first.processes()
        for process in processes:
            process.suspend()  # or it would end before the second has imported torch
        second = run_to_end(testbed.arguments("columns", name))
        kill(processes, "all", dice)
        row.wait_until_gone(first, processes)
        row.trials += 1
        row.recovered += second.returncode == 1 and "is in use by process" in second.stderr
    row.identical = testbed.finish("columns", name)
    yield row


def goodput(testbed: Testbed, count: int, dice: random.Random) -> Iterator[Row]:
    """Kill the demo every two minutes: what share of the time went into steps that were kept."""
    if count == 0:
        return
    row, data = Row("kill every 2 minutes", "columns"), testbed.root / "demo"
    prepare("fashion_mnist", configs_folder() / "fashion-mnist-sample", data, Options())
    places = [f"data.path={data}", f"output_dir={testbed.root / 'runs'}", "name=demo",
              "checkpoint.every_steps=50"]  # fmt: skip
    while True:
        run = Started(["train", "demo", *places])
        try:
            run.process.communicate(timeout=120)
            break
        except subprocess.TimeoutExpired:
            processes = run.processes()
            kill(processes, "all", dice)
            row.wait_until_gone(run, processes)
            row.trials += 1
    found = read_run(testbed.folder("demo"))
    row.recovered = row.trials if found["state"] == "finished" else 0
    kept = found["kept_s"] / (found["updated"] - found["first_started"])
    row.note, row.holds = f"{kept:.1%} of the time kept", kept >= 0.9
    yield row
