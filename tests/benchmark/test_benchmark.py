"""The benchmark: turns are taken, programs are measured from outside, figures are compared."""

import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pictures import make_jpeg, write_tar
from PIL import Image

from jobs.benchmark import main
from pipeline.benchmark.commands import ProcessWatch, Run, RunPair, run_module, run_program
from pipeline.benchmark.findings import (
    BenchmarkReport,
    ModelFindings,
    compare,
    find_impossible,
)
from pipeline.benchmark.rounds import Contender, Rate, Sample, summarise, take_turns
from pipeline.benchmark.samples import collect_images, draw_photograph, write_samples
from pipeline.benchmark.worker import count_flops, loop_over_pillow
from pipeline.config import BenchmarkConfig, StorageOptions
from pipeline.errors import AbortError, SettingsError
from pipeline.images.decode import ImageLimits
from pipeline.images.host import CropRecipe, make_crop
from pipeline.images.transforms import resolve_data_config

TURN = """
import sys
from pathlib import Path
from pipeline.benchmark.rounds import serve_rounds

def run_round():
    with Path(sys.argv[1]).open("a") as log:
        log.write(sys.argv[2])
    return 5, {"decode": 0.5}

serve_rounds(run_round)
"""


def make_contender(folder: Path, name: str, *, processes: int = 1) -> Contender:
    script = folder / "turn.py"
    script.write_text(TURN)
    return Contender([str(script), str(folder / "log"), name], processes=processes)


def test_contenders_take_turns_back_and_forth(tmp_path: Path):
    contenders = {name: make_contender(tmp_path, name) for name in "ab"}
    samples = take_turns(contenders, rounds=3)
    assert (tmp_path / "log").read_text() == "ab" + "ab" + "ba" + "ab"  # the first is the warm-up
    assert [len(found) for found in samples.values()] == [3, 3]
    assert all(s.images == 5 and s.wall_s > 0 and s.cpu_s > 0 for s in samples["a"])


def test_equal_processes_count_as_one_contender(tmp_path: Path):
    samples = take_turns({"all": make_contender(tmp_path, "x", processes=2)}, rounds=1)
    assert samples["all"][0].images == 10
    assert samples["all"][0].stages == {"decode": 1.0}


def test_a_contender_that_fails_ends_the_benchmark(tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(AbortError, match=r"broken\.py ended with exit code 3"):
        take_turns({"broken": Contender([str(script)])}, rounds=1)


def test_a_rate_is_the_median_of_its_rounds():
    samples = [Sample(10, wall_s, 0.1, {"read": 0.01}) for wall_s in (1.0, 2.0, 100.0)]
    rate = summarise(samples, startup_s=4.0)
    assert rate.images_per_s == 5.0
    assert rate.cpu_ms_per_image == pytest.approx(10.0)
    assert rate.stages_ms == {"read": pytest.approx(1.0)}
    assert rate.startup_s == 4.0


PROGRAM = """
import sys, subprocess
busy = "import time\\nwhile time.process_time() < 1: pass"
child = subprocess.Popen([sys.executable, "-c", busy], start_new_session=True)
child.wait()
print("done")
"""


def test_a_program_is_measured_with_the_processes_it_leaves_to_themselves(tmp_path: Path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    run = run_program([str(script)], images=30, output=tmp_path / "out")
    assert run.images == 30
    assert run.cpu_s > 0.3
    assert run.wall_s > 0.3
    assert run.output == "done\n"
    assert set(run.peak_bytes) == {"driver", "other"}
    assert all(number > 1_000_000 for number in run.peak_bytes.values())


def make_run(images: int, wall_s: float, cpu_s: float) -> Run:
    return Run(images, wall_s, cpu_s, "", {})


@given(
    startup_s=st.floats(0.1, 100),
    image_s=st.floats(1e-4, 1),
    few=st.integers(1, 1000),
    more=st.integers(1, 10_000),
)
def test_start_up_cancels_out_of_a_programs_rate(startup_s, image_s, few, more):
    short = make_run(few, startup_s + few * image_s, 2 * (startup_s + few * image_s))
    many = few + more
    long = make_run(many, startup_s + many * image_s, 2 * (startup_s + many * image_s))
    pair = RunPair(short, long)
    sample = pair.subtract()
    assert sample.images == more
    assert sample.wall_s / more == pytest.approx(image_s, rel=1e-6, abs=1e-9)
    assert sample.cpu_s / more == pytest.approx(2 * image_s, rel=1e-6, abs=1e-9)
    assert pair.startup_s == pytest.approx(startup_s, rel=1e-4, abs=1e-5)


def test_a_long_run_that_was_not_longer_gives_no_rate():
    with pytest.raises(AbortError, match=r"no rate can be told from that; measure with more --im"):
        RunPair(make_run(10, 5.0, 5.0), make_run(50, 5.0, 6.0)).subtract()


def test_a_program_that_beats_its_own_forward_pass_is_left_out_and_named():
    rates = {
        "forward:torch-all": make_rate(75.0, 22.0),
        "timm-forward": make_rate(20.0, 40.0),
        "job": make_rate(70.0, 26.0),
        "job-fast": make_rate(90.0, 20.0),
        "dataloader": make_rate(39.0, 52.0),
        "ray-recipe": make_rate(131.0, 52.0),
    }
    refused = find_impossible(rates, engine="torch", cores=2)
    assert set(refused) == {"job-fast", "ray-recipe"}
    assert "131.0 images/s, more than the 40.0 of its forward pass alone" in refused["ray-recipe"]


def test_a_program_that_fails_says_why(tmp_path: Path):
    script = tmp_path / "program.py"
    script.write_text("raise RuntimeError('no such model')")
    with pytest.raises(AbortError, match=r"exit code 1: .*(\n.*)*RuntimeError: no such model"):
        run_program([str(script)], images=1, output=tmp_path / "out")


def test_only_processes_with_the_tag_are_followed():
    watch = ProcessWatch("no-process-has-this-tag", driver=os.getpid())
    watch._look()
    assert watch.cpu_s == 0.0
    assert watch.peak_bytes == {}


def make_rate(images_per_s: float, cpu_ms: float) -> Rate:
    return Rate(images_per_s, cpu_ms)


def test_the_job_is_compared_with_ceilings_and_alternatives():
    rates = {
        "forward:torch": make_rate(40.0, 20.0),
        "forward:torch-all": make_rate(75.0, 22.0),
        "timm-forward": make_rate(20.0, 40.0),
        "host": make_rate(200.0, 5.0),
        "host-all": make_rate(300.0, 6.0),
        "pillow": make_rate(180.0, 5.0),
        "job": make_rate(60.0, 26.0),
        "dataloader": make_rate(30.0, 52.0),
    }
    ratios = compare(rates, engine="torch", on_gpu=False)
    assert ratios["forward:torch / timm-forward, CPU time"] == 2.0
    assert ratios["host / pillow, CPU time"] == 1.0
    assert ratios["job / dataloader, images/s"] == 2.0
    assert ratios["job / its tighter ceiling, images/s"] == 60 / 75
    assert ratios["job / both ceilings on shared cores, images/s"] == pytest.approx(60 / 60)
    assert ratios["job / both ceilings on shared cores, CPU time"] == pytest.approx(28 / 26)
    assert not any("-all /" in name for name in ratios)
    assert not any("ray-recipe" in name for name in ratios)


@pytest.mark.parametrize(("host_all", "ratio"), [(400.0, 0.95), (80.0, 95 / 80)])
def test_on_a_gpu_the_job_is_compared_with_the_tighter_ceiling(host_all: float, ratio: float):
    rates = {
        "forward:torch": make_rate(100.0, 1.0),
        "host": make_rate(50.0, 20.0),
        "host-all": make_rate(host_all, 20.0),
        "job": make_rate(95.0, 30.0),
    }
    ratios = compare(rates, engine="torch", on_gpu=True)
    assert ratios == {"job / its tighter ceiling, images/s": pytest.approx(ratio)}


def test_a_report_is_a_table_and_json():
    rate = Rate(12.5, 80.0, {"read": 1.0}, startup_s=3.0)
    found = ModelFindings({"host": rate}, {"host / pillow, CPU time": 0.987}, ("decode-bound",))
    rows = [{"vectors": 1_000_000, "kind": "flat", "p50 ms": 1.2345}, {"vectors": 10, "kind": None}]
    report = BenchmarkReport({"cpu": "a", "cores": 2}, {}, {"m": found}, {"Index": rows})
    table = report.to_table()
    assert "| host | 12.5 | 80.00 | 3.0 | read 1.00 |" in table
    assert "| host / pillow, CPU time | 0.99 |" in table
    assert "decode-bound" in table
    assert "### Index\n\n| vectors | kind | p50 ms |\n|---|---|---|\n" in table
    assert "| 1,000,000 | flat | 1.23 |\n| 10 |  |  |" in table
    assert json.loads(json.dumps(report.to_dict()))["models"]["m"]["rates"]["host"]


@pytest.mark.parametrize(
    ("model", "gmacs"), [("ese_vovnet19b_dw.ra_in1k", 1.34), ("resnetv2_50.a1h_in1k", 4.11)]
)
def test_operations_are_counted_as_the_model_cards_count_them(model: str, gmacs: float):
    assert count_flops(model, 224) / 2e9 == pytest.approx(gmacs, rel=0.02)


def test_drawn_photographs_are_as_large_as_photographs():
    data = draw_photograph(1)
    assert Image.open(io.BytesIO(data)).size == (500, 375)
    assert 20_000 < len(data) < 200_000
    assert draw_photograph(1) == data != draw_photograph(2)


def test_samples_come_from_the_given_inputs_and_are_repeated(tmp_path: Path):
    images = [make_jpeg(seed) for seed in range(3)]
    write_tar(tmp_path / "in.tar", [(f"{i}.jpg", data) for i, data in enumerate(images)])
    found = collect_images([str(tmp_path / "in.tar")], 10, StorageOptions())
    assert found == images
    samples = write_samples(found, 7, tmp_path / "samples", per_shard=3)
    assert len(list(Path(samples.shards).glob("*.tar"))) == 3
    files = sorted(Path(samples.files).iterdir())
    assert [path.read_bytes() for path in files] == [images[i % 3] for i in range(7)]


def test_the_pillow_loop_that_is_compared_with_gives_the_same_crops():
    data_config = resolve_data_config("fbnetv3_b.ra2_in1k")
    for seed, size in enumerate([(640, 480), (333, 500)]):
        data = make_jpeg(seed, size)
        recipe = CropRecipe(data_config, exif="apply", fast=False, limits=ImageLimits())
        assert (make_crop(data, recipe).pixels == loop_over_pillow(data, data_config)).all()


@pytest.mark.slow
def test_the_benchmark_measures_ceilings_and_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "report.json"
    arguments = ["--model", "fbnetv3_b.ra2_in1k", "--measure", "forward", "host"]
    arguments += ["--images", "8", "--rounds", "1", "--image-size", "32", "--batch-size", "4"]
    arguments += ["--engine", "torch", "openvino"]
    assert main([*arguments, "--output", str(output), "--work-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(output.read_text())
    assert json.loads(printed[-1]) == report
    rates = report["models"]["fbnetv3_b.ra2_in1k"]["rates"]
    assert {"forward:torch", "arithmetic", "host", "host-all", "pillow"} <= set(rates)
    assert {"timm-forward", "forward:openvino", "timm-openvino"} <= set(rates)
    assert set(rates["host"]["stages_ms"]) == {"read", "decode", "transform"}
    assert any(line.startswith("| host / pillow, CPU time |") for line in printed)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


STAGES = ("list", "read", "decode", "transform", "forward", "write", "idle")
JOB = f"""
import json, sys, tarfile, time
from pathlib import Path
shards = Path(sys.argv[sys.argv.index("--input") + 1]).iterdir()
images = sum(len(tarfile.open(path).getnames()) for path in shards)
while time.process_time() < 0.2 + 0.01 * images:
    pass
time.sleep(0.4 + 0.03 * images)
report = {{"rows": {{"ok": images}}, "stage_seconds": dict.fromkeys({STAGES!r}, 0.1)}}
print(json.dumps(report | {{"efficiency": {{"reached": 1.0, "advice": "nothing to do"}}}}))
"""
"""Takes the place of the embed job: 10 ms of CPU time an image, and 30 ms of waiting."""


@pytest.mark.slow
def test_the_benchmark_measures_variants_and_scaling_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "embed.py").write_text(JOB)
    monkeypatch.setattr("pipeline.benchmark.programs.JOBS", tmp_path / "jobs")
    output = tmp_path / "report.json"
    arguments = ["--model", "fbnetv3_b.ra2_in1k", "--measure", "decode", "scaling"]
    arguments += ["--images", "20", "--rounds", "1", "--image-size", "32"]
    assert main([*arguments, "--output", str(output), "--work-dir", str(tmp_path)]) == 0
    found = json.loads(output.read_text())["models"]["fbnetv3_b.ra2_in1k"]
    assert {"job", "job-fast", "job-decode-stage"} <= set(found["rates"])
    assert "job-fast / job, CPU time" in found["ratios"]
    assert set(STAGES) == set(found["rates"]["job"]["stages_ms"])
    scaling = found["tables"]["Scaling"]
    assert [row["case"] for row in scaling][:4] == [
        "1 actors",
        "2 actors",
        "4 actors",
        "1x the images",
    ]
    assert [row["images"] for row in scaling] == [20, 20, 20, 20, 80, 320, 20, 20]
    assert all(row["cpu_ms_per_image"] == pytest.approx(10, rel=0.5) for row in scaling)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_benchmark_measures_the_real_job(tmp_path: Path):
    output = tmp_path / "report.json"
    arguments = ["--model", "ese_vovnet19b_dw.ra_in1k", "--measure", "job", "--rounds", "1"]
    arguments += ["--images", "600", "--image-size", "128"]
    assert main([*arguments, "--output", str(output), "--work-dir", str(tmp_path)]) == 0
    rate = json.loads(output.read_text())["models"]["ese_vovnet19b_dw.ra_in1k"]["rates"]["job"]
    assert rate["images_per_s"] > 0
    assert set(STAGES) <= set(rate["stages_ms"])
    assert rate["startup_s"] > 0


def test_the_benchmark_measures_indexes_and_says_what_would_be_chosen(tmp_path: Path):
    output = tmp_path / "report.json"
    arguments = ["--measure", "index", "--index-rows", "3000", "--index-dim", "32"]
    assert main([*arguments, "--output", str(output), "--work-dir", str(tmp_path)]) == 0
    tables = json.loads(output.read_text())["tables"]
    assert [row["vectors"] for row in tables["Index"]] == [3000, 3000]
    assert tables["Index"][0]["recall@10"].startswith("1.000")
    assert {row["kind"] for row in tables["What --kind auto chooses"]} >= {"flat", "rabitq"}


def test_a_profile_says_how_busy_a_device_was_kept(tmp_path: Path):
    write_samples([draw_photograph(0)], 192, tmp_path / "samples", per_shard=64)
    spec = {"model": "ese_vovnet19b_dw.ra_in1k", "weights": "random:0", "cores": 1}
    shards = str(tmp_path / "samples" / "shards")
    found = run_module("pipeline.benchmark.overlap", spec | {"shards": shards})
    assert found["images"] == 192
    assert 0 < found["device_busy"] < 1
    assert found["wall_ms"] > found["device_ms"] > 0
    assert 0 < found["actor_ms"] < found["wall_ms"]


def test_a_module_that_fails_says_why():
    with pytest.raises(AbortError, match=r"overlap ended with exit code 1: (?s:.*)KeyError"):
        run_module("pipeline.benchmark.overlap", {})


@pytest.mark.slow
def test_a_simulated_cluster_with_gpus_commits_every_shard_once():
    simulation = {"shards": 40, "actors": 2, "chunk_s": 0.01}
    found = run_module("pipeline.benchmark.simulation", simulation)
    assert found["rows"] == 40
    assert found["chunks_per_s"] > 0
    assert found["driver_cpu_ms"] > 0


def test_wrong_settings_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SettingsError, match="images is 4; a rate needs at least 8"):
        BenchmarkConfig(images=4)
    with pytest.raises(SettingsError, match="rounds is 0; it must be at least 1"):
        BenchmarkConfig(rounds=0)
    with pytest.raises(SettingsError, match="simulated_actors is 0; it must be at least 1"):
        BenchmarkConfig(simulated_actors=0)
    with pytest.raises(SettingsError, match=r"simulated_chunk_s is 0\.0; it must be positive"):
        BenchmarkConfig(simulated_chunk_s=0.0)
    assert main(["--model", "resnet50"]) == 2
    assert "unknown backbone 'resnet50'" in capsys.readouterr().err
