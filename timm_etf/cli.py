"""`timm-etf VERB`: one thin function per verb, and nothing heavy imported before it is known."""

from pathlib import Path
from typing import Literal

import tyro

from timm_etf.errors import one_line_errors
from timm_etf.pretrain.config import PretrainConfig
from timm_etf.processes import is_first_process

app = tyro.extras.SubcommandApp()


@app.command(name="pretrain")
def pretrain(config: tyro.conf.OmitArgPrefixes[PretrainConfig]) -> None:
    """Pretrain a timm architecture with a fixed or a learned classifier (one process; see also accelerate launch)."""
    from timm_etf.pretrain.loop import pretrain, summary

    results = pretrain(config)
    if is_first_process():
        print(summary(config, results))


@app.command(name="demo")
def demo(out: Path, resume: bool = False) -> None:
    """The five-minute demo: pretrain a small backbone twice (learned and fixed head), probe both, export both.

    Args:
        out: Folder for everything the demo makes, new or empty.
        resume: Continue a demo that was stopped.
    """
    from timm_etf.demo import run

    run(out, resume=resume)


@app.command(name="transfer")
def transfer(
    models: tuple[str, ...],
    targets: tuple[str, ...],
    out: Path,
    protocols: tuple[Literal["probe", "knn", "finetune", "fewshot"], ...] = ("probe", "knn", "fewshot"),
    seeds: int = 3,
    data_root: Path = Path("data"),
    features: Path | None = None,
    depths: int = 0,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch_size: int = 256,
    workers: int = 2,
    finetune_steps: int = 500,
    finetune_batch_size: int = 64,
) -> None:
    """Tell whether one backbone transfers better than another: tables with intervals, results.json, pictures.

    Run again, it computes only what is missing; a run that was stopped continues.

    Args:
        models: [LABEL=]NAME[,ARGUMENT=VALUE...]: any timm name, local-dir:FOLDER or hf-hub:REPO. The first is what the
            others are compared with; several under one label are training seeds of one method.
        targets: Names (cifar10, flowers102, ...; or the suites offline, embedded, hub), image folders, folders of
            parquet files, or Hub data set ids; each may have fields behind it, as in
            DATA,test=validation,metric=mean_per_class.
        out: Folder of the results and the report.
        protocols: How to measure.
        seeds: Repetitions of what is random in a protocol.
        data_root: Folder that `timm-etf data build` filled.
        features: Folder of the feature cache, to share it between runs; by default in OUT.
        depths: Number of layers before the pre-logits to probe, too, evenly spaced.
        precision: Of the models' computations; features are stored as float32.
        batch_size: Images per forward pass.
        workers: Loader processes.
        finetune_steps: Optimizer steps of each fine-tuning.
        finetune_batch_size: Images per step of it.
    """
    from timm_etf.transfer import run
    from timm_etf.transfer.fine_tuning import Budget

    budget = Budget(finetune_steps, finetune_batch_size, workers)
    settings = run.Settings(
        models=models,
        targets=targets,
        protocols=protocols,
        out=out,
        seeds=seeds,
        data_root=data_root,
        features=features,
        depths=depths,
        precision=precision,
        batch_size=batch_size,
        workers=workers,
        budget=budget,
    )
    report = run.run(settings)
    if is_first_process():
        print(run.summary(report, out))


@app.command(name="geometry")
def geometry(
    models: tuple[str, ...],
    data: tuple[str, ...],
    out: Path,
    data_root: Path = Path("data"),
    features: Path | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch_size: int = 256,
    workers: int = 2,
) -> None:
    """Measure how collapsed features are: NC1 to NC4, CDNV, VCI, class covariance as heat map, trace and spectrum.

    Args:
        models: [LABEL=]NAME[,ARGUMENT=VALUE...], as in timm-etf transfer; several under one label are trainings of one
            method.
        data: Data sets, as the targets of timm-etf transfer; the source as DATA,test=validation.
        out: Folder of the results and the report.
        data_root: Folder that `timm-etf data build` filled.
        features: Folder of the feature cache, such as that of a transfer run; by default in OUT.
        precision: Of the models' computations; features are stored as float32.
        batch_size: Images per forward pass.
        workers: Loader processes.
    """
    from timm_etf.features.study import Inputs
    from timm_etf.studies import geometry

    results = geometry.run(Inputs(models, data, out, data_root, features, precision, batch_size, workers))
    if is_first_process():
        print(geometry.summary(results, out))


@app.command(name="random-features")
def random_features(
    models: tuple[str, ...],
    data: tuple[str, ...],
    out: Path,
    a2: tuple[float, ...] = (0.0, 0.1, 0.5),
    num_features: tuple[int, ...] = (125, 250, 500, 1000, 2000, 4000),
    gammas: tuple[float, ...] = (0.01, 0.1, 1.0),
    a1: float = 1.0,
    a0: float = 0.0,
    draws: int = 10,
    samples: int = 1000,
    seed: int = 0,
    data_root: Path = Path("data"),
    features: Path | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    batch_size: int = 256,
    workers: int = 2,
) -> None:
    """Regress labels on random features of a model's features: test error, simulated and as theory predicts it.

    Args:
        models: [LABEL=]NAME[,ARGUMENT=VALUE...], as in timm-etf transfer.
        data: Data sets, as the targets of timm-etf transfer.
        out: Folder of the results and the report.
        a2: Quadratic coefficients of the random features' sigma(t) = a2 t^2 + a1 t + a0.
        num_features: Numbers N of random features.
        gammas: Ridge penalties.
        a1: Linear coefficient.
        a0: Constant one.
        draws: Simulations at each N.
        samples: At most so many images of each split; time grows with their cube.
        seed: Seed of the draws.
        data_root: Folder that `timm-etf data build` filled.
        features: Folder of the feature cache, such as that of a transfer run; by default in OUT.
        precision: Of the models' computations; features are stored as float32.
        batch_size: Images per forward pass.
        workers: Loader processes.
    """
    from timm_etf.features.study import Inputs
    from timm_etf.studies import random_features

    sweep = random_features.Sweep(a2, num_features, gammas, a1, a0, draws, samples, seed)
    results = random_features.run(Inputs(models, data, out, data_root, features, precision, batch_size, workers), sweep)
    if is_first_process():
        print(random_features.summary(results, out))


@app.command(name="models")
def models(pattern: tyro.conf.Positional[str] = "*", num_classes: int = 1000, compute: bool = False) -> None:
    """List what fits: width, frame, coherence and its bound, and what a fixed classifier saves.

    Args:
        pattern: Wildcard of timm names, such as 'resnet*'.
        num_classes: Number of classes K.
        compute: Compute the spherical codes that are not cached yet: seconds for each width, minutes beyond 20,000
            classes.
    """
    from timm_etf.coverage import coverage, left_out, table

    print(table(coverage(pattern, num_classes, compute=compute), num_classes))
    for name, reason in left_out(pattern).items():
        print(f"left out: {name}, {reason}")
    print(f"next: timm.create_model(NAME, num_classes={num_classes}) after import timm_etf")


@app.command(name="data")
def data(
    action: tyro.conf.Positional[Literal["build"]],
    suite: tyro.conf.Positional[Literal["embedded", "offline"]],
    root: Path,
    seed: int = 0,
) -> None:
    """Build images to pretrain on and to transfer to, for machines that have none.

    Args:
        action: What to do.
        suite: embedded, the demo's images, from fonts that PyPI packages ship; or offline, a larger suite from npm,
            Debian and PyPI packages that are downloaded for it.
        root: Folder that receives one folder per data set.
        seed: Seed of the offline suite's splits.
    """
    from timm_etf import data

    missing: dict[str, str] = {}
    if suite == "embedded":
        built = data.build_pictograms(root), *data.build_targets(root).values()
    else:
        folders, missing = data.build_offline(root, seed=seed)
        built = tuple(folders.values())
    for folder in built:
        print(folder)
    for name, reason in missing.items():
        print(f"not built: {name}: {reason}")
    if suite == "offline" and built:
        print(f"next: timm-etf transfer --models NAME ... --targets offline --data-root {root} --out OUT")


@app.command(name="publish")
def publish(
    run: tyro.conf.Positional[Path],
    repo: tyro.conf.Positional[str],
    results: tuple[Path, ...] = (),
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    pr: bool = False,
    message: str = "Publish with timm_etf",
    yes: bool = False,
) -> None:
    """Publish a run on the Hugging Face Hub; without --yes, show what would be uploaded.

    Args:
        run: Folder of timm-etf pretrain, or an exported folder.
        repo: Repository, ORG/NAME.
        results: results.json files of timm-etf transfer on this model, for its card.
        license: Licence of the weights, such as apache-2.0.
        private: Whether a new repository is private; by default as the organisation has it.
        revision: Branch, by default the main one.
        tag: Tag of the published commit, such as v1.
        pr: Propose the upload as a pull request.
        message: Commit message.
        yes: Upload.
    """
    from timm_etf import hub

    planned = hub.plan(run, repo, results=results, license=license, revision=revision)
    print(planned.table())
    count = len(planned.changed)
    if not yes:
        print(f"\n{planned.card_or_diff()}\n")
        print(f"Nothing was sent. next: the same command with --yes uploads {count} file{'s' * (count != 1)}")
        return
    url = hub.publish(planned, private=private, tag=tag, create_pr=pr, message=message)
    print(f"{'published' if count else 'nothing new to upload'}: {url}")
    if not pr:
        print(f"next: timm.create_model('hf-hub:{repo}{f'@{revision}' if revision else ''}', pretrained=True)")


def main() -> None:
    """Entry point of the `timm-etf` command."""
    with one_line_errors():
        app.cli(prog="timm-etf", description="Image backbones pretrained under a fixed classifier.")
