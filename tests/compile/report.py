"""Print registers, spills, shared memory and matrix instructions of the kernels, as a table.

python tests/compile/report.py [nystrom] [sm_90 sm_80 sm_100 gfx942 ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
from bench.offline import compiling_for, inspect, parse_target  # noqa: E402
from tests.compile import block_sparse_launches, nystrom_launches  # noqa: E402

COLUMNS = ("registers", "spilled", "shared", "warps", "hgmma", "hmma")


def main(targets: list[str]) -> None:
    family = nystrom_launches if "nystrom" in targets else block_sparse_launches
    targets = [target for target in targets if target != "nystrom"]
    for target in targets or ["sm_90"]:
        print(f"\n| {target} | kernel | " + " | ".join(COLUMNS) + " |")
        print("|---" * (len(COLUMNS) + 2) + "|")
        for launch in family.all_launches():
            with compiling_for(parse_target(target)) as launches:
                launch.run()
            for name, kernel in {kernel.hash: (name, kernel) for name, kernel in launches}.values():
                if name not in ("delta_kernel", "merge_kernel"):
                    report = inspect(name, kernel)
                    facts = (getattr(report, column) for column in COLUMNS)
                    cells = ("-" if fact is None else str(fact) for fact in facts)
                    print(f"| {launch} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
