"""One backbone on one machine, ready to be measured."""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.backbones import load_weights, save_weights
from pipeline.benchmark.samples import SampleSet
from pipeline.config import BenchmarkConfig
from pipeline.images.resize import DataConfig
from pipeline.images.transforms import resolve_data_config

JOBS = Path(__file__).parents[2] / "jobs"


@dataclass(frozen=True, slots=True)
class Setting:
    """What every measurement with a backbone needs.

    Attributes:
        config: The settings of the benchmark.
        model: Name of the backbone.
        weights: Path of its checkpoint.
        data_config: Its preprocessing.
        device: Torch device.
        cores: CPU cores of the machine.
        short: Images of a short round.
        fewer: Images of a program's short run.
        samples: Images of its long run.
        folder: Where outputs may be written.
    """

    config: BenchmarkConfig
    model: str
    weights: str
    data_config: DataConfig
    device: str
    cores: int
    short: SampleSet
    fewer: SampleSet
    samples: SampleSet
    folder: Path

    @property
    def large(self) -> Path:
        """Folder of the photographs of 12 megapixels."""
        return self.folder / f"large-{self.model}"

    @property
    def batch_size(self) -> int:
        """Images in one forward pass."""
        return self.config.batch_size or (16 if self.device == "cpu" else 128)

    @property
    def devices(self) -> int:
        """How many actors the job has unless told otherwise."""
        return self.cores if self.device == "cpu" else torch.cuda.device_count()


def prepare_setting(
    config: BenchmarkConfig, model: str, folder: Path, *, samples: tuple[SampleSet, ...]
) -> Setting:
    """Write the weights of a backbone and work out the rest.

    Args:
        config: The settings of the benchmark.
        model: Name of the backbone.
        folder: Where to write.
        samples: Images of a round, of a program's short run, and of its long one.
    """
    short, fewer, many = samples
    weights = folder / f"{model}.safetensors"
    save_weights(load_weights(model, config.weights).state_dict, str(weights))
    data_config = resolve_data_config(model, use_test_size=config.image_size == "test")
    if config.image_size.isdecimal():
        data_config = data_config.with_size(int(config.image_size))
    return Setting(
        config=config,
        model=model,
        weights=str(weights),
        data_config=data_config,
        device="cuda" if torch.cuda.is_available() else "cpu",
        cores=count_cores(),
        short=short,
        fewer=fewer,
        samples=many,
        folder=folder,
    )


def count_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def has_timm() -> bool:
    """Return whether timm, which some contenders need, is installed."""
    return importlib.util.find_spec("timm") is not None
