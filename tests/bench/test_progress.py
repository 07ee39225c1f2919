"""Progress of examples and benchmarks without a terminal: a line for every tenth of the way."""

from __future__ import annotations

import pytest

pytest.importorskip("tqdm")
from bench.progress import progress_bar  # noqa: E402


@pytest.mark.parametrize("total", [4, 10, 400])
def test_a_log_has_a_line_for_every_tenth(total, capsys):
    with progress_bar(total, "training") as bar:
        for step in range(total):
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update()
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert min(total, 10) <= len(lines) <= 12
    assert lines[-1].startswith(f"training: {total} of {total} steps")
    assert f"loss {total - 1}" in lines[-1]
