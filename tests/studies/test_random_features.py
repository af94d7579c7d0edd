import json
from pathlib import Path

import numpy as np
import pytest

from timm_etf import UsageError
from timm_etf.studies.random_features import Settings, run, summary


def test_every_point_of_the_sweep_on_every_model(exported: Path, images: Path, tmp_path: Path) -> None:
    models = tuple(f"{n}=local-dir:{exported}/{n}" for n in ("plain", "fixed", "damaged"))
    sweep = {"a2": (0.0, 0.4), "num_features": (20, 200), "gammas": (0.1, 1.0), "draws": 20, "samples": 50}
    data = (f"{images},name=bars,test=validation",)
    results = run(Settings(models=models, data=data, out=tmp_path, workers=0, **sweep))
    assert json.loads((tmp_path / "results.json").read_text()) == {"schema": 1} | json.loads(json.dumps(results))
    assert list(results["missing"]) == ["damaged: bars"]
    for label in ("plain", "fixed"):
        (points,) = results["random_features"]["bars"][label]
        assert {(p["a2"], p["num_features"], p["gamma"]) for p in points} == {
            (a, n, g) for a in (0.0, 0.4) for n in (20, 200) for g in (0.1, 1.0)
        }
        # Features of a network are no Gaussian mixture: the theory is near the simulations, not always within them.
        assert np.median([abs(p["theory"] / p["simulated"] - 1) for p in points]) < 0.1
        strong = [p["simulated"] for p in points if p["gamma"] == 1.0]
        assert max(strong) < 1.3  # a strong penalty does about as well as the mean, at least
    assert (tmp_path / "random-features-bars.png").read_bytes().startswith(b"\x89PNG")
    assert "- **missing**: damaged: bars" in (tmp_path / "report.md").read_text()
    assert "bars, fixed: least test error" in summary(results, tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gammas": (0.0,)}, "positive"),
        ({"num_features": ()}, "at least one a2"),
        ({"samples": 1}, "samples at least 2"),
        ({"a1": 0.0}, "do not depend on the image"),
        ({"a2": (0.0, float("nan"))}, "--a2 must be finite"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(tmp_path: Path, changes: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(Settings(models=("resnet18",), data=(str(tmp_path),), out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
