"""What an epoch's time line says."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretrain.runs import config, lines
from timm_etf.pretrain.clock import Clock, advice, shares
from timm_etf.pretrain.loop import pretrain

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_time_is_counted_once_and_for_what_is_innermost() -> None:
    clock = Clock()

    def slow() -> Any:
        for number in range(2):
            time.sleep(0.05)
            yield number

    with clock.measure("stepping"):
        time.sleep(0.05)
        assert list(clock.waits(slow())) == [0, 1]
        with clock.measure("saving"):
            time.sleep(0.03)
    seconds = clock.lap()
    assert seconds["waiting"] == pytest.approx(0.1, abs=0.02)
    assert seconds["stepping"] == pytest.approx(0.05, abs=0.02)
    assert seconds["saving"] == pytest.approx(0.03, abs=0.02)
    assert sum(clock.lap().values()) == 0


def spent(waiting: float = 0, stepping: float = 0, validating: float = 0, saving: float = 0) -> dict[str, float]:
    return {"waiting": waiting, "stepping": stepping, "validating": validating, "saving": saving}


@pytest.mark.parametrize(
    ("seconds", "device", "changes", "says"),
    [
        (spent(30, 70), CUDA, {}, "--workers, now 0"),
        (spent(0, 70, 0, 30), CUDA, {}, "--checkpoint-steps"),
        (spent(0, 50, 50), CPU, {}, "--val-split"),
        (spent(0, 50, 50), CPU, {"model_ema": True}, "--model-ema"),
        (spent(0, 90, 10), CUDA, {}, "--amp bf16 or --compile"),
        (spent(0, 90, 10), CUDA, {"amp": "bf16"}, "--compile"),
        (spent(0, 90, 10), CPU, {}, ""),
        (spent(), CUDA, {}, "--compile"),
    ],
)
def test_advice_names_an_option_that_is_not_taken(
    seconds: dict[str, float], device: torch.device, changes: dict[str, Any], says: str
) -> None:
    found = advice(seconds, config(Path("x"), Path("y"), **changes), device)
    assert says in found
    assert bool(says) == bool(found)


def test_a_runs_time_is_told_and_recorded(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.perf_counter()
    pretrain(config(images, tmp_path / "run", epochs=2))
    took = time.perf_counter() - began
    recorded = [line["seconds"] for line in lines(tmp_path / "run")]
    assert all(set(seconds) == set(spent()) and seconds["stepping"] > 0 for seconds in recorded)
    assert sum(sum(seconds.values()) for seconds in recorded) < took
    told = capsys.readouterr().out.splitlines()
    for epoch, seconds in enumerate(recorded, 1):
        (line,) = (line for line in told if line.startswith(f"epoch {epoch}/2"))
        assert line.endswith(f"({shares(seconds)})")
    assert len([line for line in told if "--workers" in line]) <= 1
    rate = 112 / (recorded[1]["waiting"] + recorded[1]["stepping"])
    assert lines(tmp_path / "run")[1]["images_per_second"] == pytest.approx(rate, rel=0.01)


def test_waiting_on_a_gpu_is_what_the_gpu_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.02, 0.02, 0.07, 0.1, 0.1])  # of the GPU, where it is idle from and to

    class Event:
        """A moment on a GPU's timeline."""

        def __init__(self, enable_timing: bool) -> None:
            self.at = next(moments)

        def record(self, stream: Any) -> None:
            """Nothing."""

        def query(self) -> bool:
            return True

        def elapsed_time(self, later: "Event") -> float:
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    clock = Clock(CUDA)

    def slow() -> Any:
        for _ in range(2):
            time.sleep(0.05)
            yield None

    assert len(list(clock.waits(slow()))) == 2
    seconds = clock.lap()
    # It waited 0.02 and 0.05 s, of 0.05 s each; the end of the batches took no time.
    assert seconds["waiting"] == pytest.approx(0.07, abs=0.005)
    assert seconds["waiting"] + seconds["stepping"] == pytest.approx(0.1, abs=0.02)
