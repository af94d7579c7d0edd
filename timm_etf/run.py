"""`timm-etf run SCRIPT ...`: any script or module, with the variants known to timm."""

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from timm_etf.errors import UsageError

USAGE = """\
usage: timm-etf run SCRIPT ... | -m MODULE ...

Register the variants, then run a script or a module as python would: timm's train.py, validate.py, inference.py,
onnx_export.py and whatever else makes its models with timm.create_model know resnet50_etf and the others, unchanged.

  timm-etf run train.py --model resnet50_etf --data-dir DATA
  torchrun --nproc-per-node 8 -m timm_etf run train.py --model resnet50_etf --data-dir DATA
next: timm-etf models"""


def prepare(arguments: list[str]) -> Callable[[], object]:
    """What runs a script or a module in this process, as `__main__`, with its arguments; its exit status is this one's.

    Args:
        arguments: `SCRIPT ...` or `-m MODULE ...`.

    Returns:
        A function to call.

    Raises:
        UsageError: If there is no such script or module.
    """
    target, *rest = arguments
    is_module = target == "-m"
    if is_module:
        if not rest:
            raise UsageError("timm-etf run -m takes a module.")
        target, *rest = rest
        sys.path[0] = ""  # as python -m has it
        try:
            found = importlib.util.find_spec(target) is not None
        except (ImportError, ValueError):  # a part of the name is no package
            found = False
    else:
        found = Path(target).is_file()
        sys.path[0] = str(Path(target).resolve().parent)
    if not found:
        raise UsageError(f"No {'module' if is_module else 'script'} {target} to run.")
    sys.argv = [target, *rest]
    importlib.reload(importlib.import_module("timm_etf"))  # whole, where the command had left out what it need not have
    if is_module:
        return partial(runpy.run_module, target, run_name="__main__", alter_sys=True)
    return partial(runpy.run_path, target, run_name="__main__")
