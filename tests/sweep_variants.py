"""Build, run forward and differentiate every variant, at 10, 100, 1,000 and 21,843 classes.

    python tests/sweep_variants.py            # all names: about an hour, on the meta device (shapes without numbers)
    python tests/sweep_variants.py 'resnet*'  # some

Prints one line per failure, then the table: how many variants have the base's exact state-dict keys and shapes, all
classifiers fixed and no trainable head parameter, run forward to [2, K] and backward to every parameter; by frame; and
every name left out with its reason. Without a pattern it then writes timm_etf/coverage.json anew, for this version of
timm.
"""

import json
import sys
from collections import Counter

import timm
import torch
from tqdm import tqdm

import timm_etf  # noqa: F401 - registers the variants
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.coverage import SHIPPED, classifiers
from timm_etf.variants import SUFFIX, SW_SUFFIX, base_name, skipped

NUM_CLASSES = (10, 100, 1000, 21843)


def check(name: str, num_classes: int = 10) -> tuple[str, str | None]:
    """Frames of one variant, and what is wrong with it or None; at 10 classes it is compared with its base."""
    with torch.device("meta"):
        variant = timm.create_model(name, num_classes=num_classes)
        kinds = "+".join(sorted({head.frame for _, head in fixed_classifiers(variant)}))
        heads = classifier_names(variant)
        if {n for n, _ in fixed_classifiers(variant)} != set(heads):
            return kinds, "not every classifier is fixed"
        images = torch.zeros(2, *variant.pretrained_cfg["input_size"])
        logits = variant.train()(images)
        for one in logits if isinstance(logits, tuple) else (logits,):  # distilled pairs give both while training
            if one.shape != (2, num_classes):
                return kinds, f"logits of shape {list(one.shape)}"
        sum(one.sum() for one in (logits if isinstance(logits, tuple) else (logits,))).backward()
        if num_classes != 10:
            return kinds, None
        base = timm.create_model(base_name(name), num_classes=num_classes)
        logits = base.train()(images)
        sum(one.sum() for one in (logits if isinstance(logits, tuple) else (logits,))).backward()
    if {k: v.shape for k, v in variant.state_dict().items()} != {k: v.shape for k, v in base.state_dict().items()}:
        return kinds, "state dict differs from the base's"
    parameters = {n: p for n, p in base.named_parameters() if n.rpartition(".")[0] not in heads}
    if {n for n, p in variant.named_parameters() if p.requires_grad} != set(parameters):
        return kinds, "trainable parameters are not the base's without its classifier"
    reached = {n for n, p in variant.named_parameters() if p.grad is not None}
    expected = {n for n, p in parameters.items() if p.grad is not None}
    return kinds, None if reached == expected else "the gradient does not reach what it reaches in the base"


def main(pattern: str = "*") -> int:
    """Check all variants that match; returns the number of failures."""
    names = timm.list_models(pattern + SUFFIX)
    if not pattern.endswith(SW_SUFFIX):
        names = [n for n in names if not n.endswith(SW_SUFFIX + SUFFIX)]
    bases = [n for n in timm.list_models(pattern) if not n.endswith((SUFFIX, SW_SUFFIX))]
    counts = {k: Counter[str]() for k in NUM_CLASSES}
    failures = 0
    for name in tqdm(names, unit="model", mininterval=10):
        for num_classes in NUM_CLASSES:
            try:
                kinds, problem = check(name, num_classes)
            except Exception as e:  # any error is a finding of the sweep
                kinds, problem = "failed", f"{type(e).__name__}: {e}"
            if problem:
                failures += 1
                print(f"{name} with {num_classes} classes: {problem}", flush=True)
            counts[num_classes]["failed" if problem else kinds] += 1
    kinds = sorted({kind for count in counts.values() for kind in count})
    print(f"| {len(bases)} timm names, {len(names)} variants | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for num_classes, count in counts.items():
        print(f"| K = {num_classes} | {' | '.join(str(count[kind]) for kind in kinds)} |")
    for base, reason in skipped.items():
        if base in bases:
            print(f"- {base}: {reason}")
    if pattern == "*":
        write_coverage()
    return failures


def write_coverage() -> None:
    """Write what the package ships of timm's architectures, a line for each."""
    lines = (f"  {json.dumps(name)}: {json.dumps(heads)}" for name, heads in classifiers("*").items())
    left_out = json.dumps(skipped, indent=1)
    found = ",\n".join(lines)
    SHIPPED.write_text(f'{{"timm": "{timm.__version__}", "left_out": {left_out}, "classifiers": {{\n{found}\n}}}}\n')


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:2])))
