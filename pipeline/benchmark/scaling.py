"""How the job's rate changes with actors, with the number of images, and with their size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.benchmark.commands import RunPair
from pipeline.benchmark.programs import make_job_command, run_job
from pipeline.benchmark.samples import SampleSet, draw_photograph, write_samples
from pipeline.benchmark.setting import Setting
from pipeline.log import LOG

_ACTORS = (1, 2, 4)
_TIMES = (1, 4, 16)
_TINY, _HUGE = (64, 48), (4000, 3000)
_DRAWN_IMAGES = 8


@dataclass(frozen=True, slots=True)
class ScalingRow:
    """One run of the job.

    Attributes:
        case: What is different about it.
        actors: Number of embedder actors.
        images: Number of images.
        images_per_s: By the clock on the wall, start-up apart.
        cpu_ms_per_image: CPU time of all processes, start-up apart.
        startup_s: What the run costs apart from the rate.
    """

    case: str
    actors: int
    images: int
    images_per_s: float
    cpu_ms_per_image: float
    startup_s: float


def measure_scaling(setting: Setting) -> list[ScalingRow]:
    """Run the job in every case once; ``setting.config.images`` is the number of the smallest."""
    rows = []
    for case, actors, samples in _list_cases(setting):
        command = [*make_job_command(setting), *_limit_actors(actors, setting)]
        pair = run_job(command, *samples, setting.folder)
        row = _make_row(case, actors, pair)
        LOG.info("%s %s images_per_s=%.1f", setting.model, case, row.images_per_s)
        rows.append(row)
    return rows


def _list_cases(setting: Setting) -> Iterator[tuple[str, int, tuple[SampleSet, SampleSet]]]:
    number = setting.config.images
    for actors in _ACTORS:
        yield f"{actors} actors", actors, (setting.fewer, setting.samples)
    for times in _TIMES:
        images = [draw_photograph(seed) for seed in range(_DRAWN_IMAGES)]
        yield (
            f"{times}x the images",
            setting.devices,
            _write(setting, f"x{times}", images, number * times),
        )
    for name, size in (("tiny", _TINY), ("huge", _HUGE)):
        images = [draw_photograph(seed, size) for seed in range(_DRAWN_IMAGES)]
        case = f"{name} images, {size[0]}x{size[1]}"
        yield case, setting.devices, _write(setting, name, images, number)


def _write(
    setting: Setting, name: str, images: Sequence[bytes], number: int
) -> tuple[SampleSet, SampleSet]:
    """Write the images of a short and of a long run."""
    per_shard, folder = max(1, setting.config.images // (4 * setting.cores)), setting.folder
    few = max(1, number * setting.fewer.images // setting.samples.images)
    short = write_samples(images, few, folder / f"{name}-short", per_shard=per_shard)
    return short, write_samples(images, number, folder / name, per_shard=per_shard)


def _limit_actors(actors: int, setting: Setting) -> list[str]:
    """Return the arguments for so many actors, which share devices where there are fewer."""
    flag = "--cpus-per-actor" if setting.device == "cpu" else "--gpus-per-actor"
    return ["--actors", str(actors), flag, f"{min(1.0, setting.devices / actors):g}"]


def _make_row(case: str, actors: int, pair: RunPair) -> ScalingRow:
    sample = pair.subtract()
    return ScalingRow(
        case=case,
        actors=actors,
        images=pair.long.images,
        images_per_s=sample.images / sample.wall_s,
        cpu_ms_per_image=1e3 * sample.cpu_s / sample.images,
        startup_s=pair.startup_s,
    )
