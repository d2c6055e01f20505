"""Plays schedules for as long as one likes: ``python -m tests.simulation --schedules 100000``."""

import argparse
import sys
import time
from collections import Counter
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.schedules import ScheduleError, draw_schedule, play


def try_schedule(seed: int) -> tuple[str, int, str]:
    """Play one schedule; return its kind, its steps, and the script if something did not hold."""
    schedule = draw_schedule(seed)
    try:
        return type(schedule).__name__, len(play(schedule).trace), ""
    except ScheduleError as error:
        return type(schedule).__name__, 0, str(error)


def main() -> int:
    """Play schedules from a seed on; print what failed, and the count."""
    parser = argparse.ArgumentParser(description="Play simulated schedules of the embed job.")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first one")
    parser.add_argument("--schedules", type=int, default=10_000, help="how many to play")
    parser.add_argument("--processes", type=int, default=2, help="how many at once")
    options = parser.parse_args()
    started_s, kinds, steps, failed = time.monotonic(), Counter[str](), 0, 0
    seeds = range(options.seed, options.seed + options.schedules)
    with Pool(options.processes) as pool:
        for kind, number, script in pool.imap_unordered(try_schedule, seeds, chunksize=50):
            kinds[kind] += 1
            steps += number
            if script:
                failed += 1
                print(script)
    seconds = time.monotonic() - started_s
    print(f"{dict(kinds)}: {steps:,} steps in {seconds:.0f} s, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
