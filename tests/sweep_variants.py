"""Build every `_etf` variant beside its base on the meta device and compare them.

    python tests/sweep_variants.py            # all names: about ten minutes
    python tests/sweep_variants.py 'resnet*'  # some

Prints one line per failure, then the table: names, variants, variants without a trainable head parameter and with the
base's exact state-dict keys and shapes, and every name left out with its reason.
"""

import sys

import timm
import torch
from tqdm import tqdm

import timm_etf  # noqa: F401 - registers the variants
from timm_etf.classifier import classifier_names, fixed_classifiers
from timm_etf.variants import SUFFIX, base_name, skipped

NUM_CLASSES = 10


def check(name: str) -> str | None:
    """What is wrong with one variant, or None."""
    with torch.device("meta"):
        base = timm.create_model(base_name(name), num_classes=NUM_CLASSES)
        variant = timm.create_model(name, num_classes=NUM_CLASSES)
    heads = classifier_names(variant)
    shapes = {k: (v.shape, v.dtype) for k, v in base.state_dict().items()}
    if {k: (v.shape, v.dtype) for k, v in variant.state_dict().items()} != shapes:
        return "state dict differs from the base's"
    if {n for n, _ in fixed_classifiers(variant)} != set(heads):
        return "not every classifier is fixed"
    trainable = {n for n, p in variant.named_parameters() if p.requires_grad}
    expected = {n for n, p in base.named_parameters() if n.rpartition(".")[0] not in heads}
    return None if trainable == expected else "trainable parameters are not the base's without its classifier"


def main(pattern: str = "*") -> int:
    """Check all variants that match; returns the number of failures."""
    bases = [n for n in timm.list_models(pattern) if not n.endswith(SUFFIX)]
    names = [n for n in timm.list_models(pattern + SUFFIX)]
    failures = {}
    for name in tqdm(names, unit="model"):
        try:
            problem = check(name)
        except Exception as e:  # any error is a finding of the sweep
            problem = f"{type(e).__name__}: {e}"
        if problem:
            failures[name] = problem
            print(f"{name}: {problem}")
    print(f"| timm names | with an {SUFFIX} variant | built, head fixed, base's keys | left out |\n|---|---|---|---|")
    left_out = {n: reason for n, reason in skipped.items() if n in bases}
    print(f"| {len(bases)} | {len(names)} | {len(names) - len(failures)} | {len(left_out)} |")
    for base, reason in left_out.items():
        print(f"- {base}: {reason}")
    return len(failures)


if __name__ == "__main__":
    sys.exit(min(1, main(*sys.argv[1:2])))
