"""Write the files that `timm-etf publish` would upload into a folder."""

import argparse
from pathlib import Path

from timm_etf import hub

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("run", type=Path)
parser.add_argument("compared", type=Path, help="results.json of timm-etf transfer")
parser.add_argument("out", type=Path, help="its name is the checkpoint's")
arguments = parser.parse_args()

arguments.out.mkdir(parents=True, exist_ok=True)
repo_id = f"timm-etf/{arguments.out.name}"
for name, content in hub.gather(arguments.run, repo_id, results=[arguments.compared], license="apache-2.0").items():
    (arguments.out / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
print(arguments.out)
