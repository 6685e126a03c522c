"""On a GPU (`pytest -m gpu`): it computes what the CPU computes, in every command that has a device."""

import json

import devices
import numpy as np
import pytest
import torch

from latent_tts.engine import attention, head
from latent_tts.engine.recording import CudaRecorder
from latent_tts.random import bits
from latent_tts.random.draw import Draw
from latent_tts.results.run_folder import read_metrics, read_rollouts

pytestmark = pytest.mark.gpu
GPU = devices.Place(torch.device("cuda:0"), lambda module: module.to("cuda:0"), recorder=CudaRecorder)
CASES = dict(devices.cases())
FEW = ["task.limit=6", "n=4"]
SAMPLERS = [["sampler=gaussian"], ["sampler=dropout", "sampler.where=[prompt,thoughts,answer]"]]


def test_annotating_and_training_run(ltts, tmp_path):
    """First, since it takes longest."""
    lines = [
        ("annotate", f"engine.device={GPU.device}", "task.limit=8", f"output={tmp_path / 'labels'}"),
        ("train-rm", f"annotations={tmp_path / 'labels'}", "optimization.epochs=1", f"output={tmp_path / 'rm'}"),
        ("tune", f"engine.device={GPU.device}", "seconds=5"),
    ]
    for line in lines:
        done = ltts(*line)
        assert done.code == 0, done.err


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_gpu_computes_what_the_cpu_computes(case):
    devices.check_same(case, GPU, tolerance=1e-6)


@pytest.fixture(params=["kernels", "operators"])
def way_to_draw(request, monkeypatch):
    """How a GPU draws."""
    if request.param == "operators":
        monkeypatch.setattr(bits, "has_kernels", lambda device: False)
    else:
        pytest.importorskip("triton")
        assert bits.has_kernels(GPU.device)


@pytest.mark.usefixtures("way_to_draw")
@pytest.mark.parametrize("width", [8, 768])
def test_random_numbers_are_those_of_the_cpu(width):
    here, there = (
        Draw.of(3, ["a", "b"], torch.arange(50, device=device).repeat(2, 1), width) for device in ("cpu", GPU.device)
    )
    torch.testing.assert_close(there.keep(2, 1, 3, width, 20_000).cpu(), here.keep(2, 1, 3, width, 20_000))
    torch.testing.assert_close(there.uniform(4).cpu(), here.uniform(4), rtol=0, atol=0)
    torch.testing.assert_close(there.normal(4, width).cpu(), here.normal(4, width), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 32), (torch.float32, 256), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 80)],
    ids=str,
)
def test_kernels_of_the_engine_are_used(dtype, width):
    """Otherwise operators would take their place, and all else would pass."""
    pytest.importorskip("triton")
    assert attention.has_kernel(torch.empty(1, width, device=GPU.device, dtype=dtype))
    assert head.has_kernel(torch.empty(1, width, device=GPU.device, dtype=dtype))


@pytest.fixture
def rollouts_of(ltts, tmp_path):
    """The rollouts of a run on a device, after looking at what it says of itself."""

    def drawn(device, *line):
        done = ltts("run", *FEW, f"engine.device={device}", f"paths.cache={tmp_path / str(device)}", *line)
        assert done.code == 0, done.err
        record = json.loads((done.last.parent / "run.json").read_text())
        assert record["devices"] == [torch.device(device).type]
        assert torch.device(device).type == "cpu" or {"gpu", "cuda"} <= set(record["machine"])
        costs = read_metrics(done.last).groupby("metric")["value"].max()
        assert costs["seconds"] > 0
        # beams have no floor, and what a CPU reaches beside other tests varies
        assert device == "cpu" or not costs["floor_seconds"] > costs["seconds"]
        table = read_rollouts(done.last.parent)
        assert np.isfinite(table["answer_logprob"]).all()
        return table.assign(peak_memory_bytes=costs["peak_memory_bytes"])

    return drawn


@pytest.mark.parametrize("sampler", SAMPLERS, ids=" ".join)
def test_a_run_in_float32_draws_the_rollouts_of_the_cpu(rollouts_of, sampler):
    """But where the two most probable tokens are too near each other to tell."""
    here, there = (rollouts_of(device, *sampler) for device in ("cpu", GPU.device))
    clear = (here["answer_margin"] >= 1e-4) & (there["answer_margin"] >= 1e-4)
    assert clear.mean() > 0.9
    assert list(there["answer_text"][clear]) == list(here["answer_text"][clear])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=" ".join)
def test_so_does_one_of_replayed_graphs(rollouts_of, sampler):
    line = *sampler, "task.limit=40", "engine.rows=16"
    here, there = rollouts_of("cpu", *line), rollouts_of(GPU.device, *line, "engine.graph=on")
    clear = (here["answer_margin"] >= 1e-4) & (there["answer_margin"] >= 1e-4)
    assert clear.mean() > 0.9
    assert list(there["answer_text"][clear]) == list(here["answer_text"][clear])
    np.testing.assert_allclose(there["score"], here["score"], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=" ".join)
def test_half_precision_gives_most_of_the_answers_of_float32(rollouts_of, dtype, sampler):
    here = rollouts_of("cpu", *sampler, "task.limit=32")
    there = rollouts_of(GPU.device, *sampler, "task.limit=32", f"engine.dtype={dtype}")
    assert (there["answer_text"] == here["answer_text"]).mean() > 0.8


def test_memory_is_a_batchs_and_not_that_of_larger_ones_before(rollouts_of):
    line = [GPU.device, "engine.graph=off"]  # graphs of the small ones would hold memory of their own
    large, small = (rollouts_of(*line, f"engine.rows={rows}", f"seed={rows}") for rows in (24, 4))
    assert small["peak_memory_bytes"].max() < large["peak_memory_bytes"].max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=" ".join)
def test_every_dtype_and_search_runs(rollouts_of, dtype, sampler):
    for line in (["scorer=latent_rm"], ["search=beam", "n=16"], ["schedule=jacobi"], ["model=demo_colar"]):
        rollouts_of(GPU.device, f"engine.dtype={dtype}", *sampler, *line)
