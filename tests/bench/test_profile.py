"""The profilers' commands, what is read from them, and what is said where they are missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench import profile

# The format of `ncu --csv`, with made-up values: no GPU has run these kernels.
FORMAT_SAMPLE = """\
==PROF== Connected to process 4711 (/usr/bin/python3.12)
==PROF== Profiling "forward_kernel" - 0: 0%....50%....100% - 9 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Kernel Name","Context","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","forward_kernel","1","Command line profiler metrics","gpu__time_duration.sum","us","2,500.0"
"0","4711","forward_kernel","1","Command line profiler metrics","launch__registers_per_thread","register/thread","206"
"0","4711","forward_kernel","1","Command line profiler metrics","sm__warps_active.avg.pct_of_peak_sustained_active","%","12.50"
"0","4711","forward_kernel","1","Command line profiler metrics","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active","%","55.10"
"0","4711","forward_kernel","1","Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","n/a"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","inst","0.50"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio","inst","3.25"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio","inst","2.00"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_gmma_not_issued_per_issue_active.ratio","inst","1.90"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio","inst","1.00"
"0","4711","forward_kernel","1","Command line profiler metrics","smsp__average_warps_issue_stalled_selected_per_issue_active.ratio","inst","1.00"
"""  # noqa: E501


def test_values_are_read_from_between_what_the_program_prints():
    ((kernel, metrics),) = profile.parse_ncu(FORMAT_SAMPLE)
    assert kernel == "forward_kernel"
    assert metrics["gpu__time_duration.sum"] == 2.5e6  # nanoseconds
    assert metrics["launch__registers_per_thread"] == 206
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed" not in metrics


def test_the_longest_stalls_come_first_and_selected_is_none():
    ((_, metrics),) = profile.parse_ncu(FORMAT_SAMPLE)
    assert profile.stalls(metrics) == "long scoreboard 3.2, gmma 2.0, barrier 1.0"


def test_the_table_has_a_line_a_kernel_and_a_dash_for_what_is_absent():
    ((kernel, metrics),) = profile.parse_ncu(FORMAT_SAMPLE)
    head, _, line = profile.table([("causal-forward", kernel, metrics)]).splitlines()
    assert head.count("|") == line.count("|")
    assert "| 2.5 | 206 | 12 % | 55 % | - | - | - | long" in line


def test_nothing_is_read_from_an_error():
    assert profile.parse_ncu("==ERROR== ERR_NVGPUCTRPERM\n") == []


def test_the_commands_leave_clocks_alone_and_run_one_work():
    command = profile.ncu_command("ncu", "window-backward")
    assert command[1:3] == ["--clock-control", "none"]
    assert command[-2:] == ["run", "window-backward"]
    assert "regex:^backward_q" in command
    check = profile.sanitizer_command("compute-sanitizer", "racecheck")
    assert check[1:3] == ["--tool", "racecheck"]
    assert check[check.index("--device") + 1] == "cuda"


def test_the_smallest_tests_exist():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", profile.SMALLEST,
         "tests/interpreter"],
        cwd=profile.ROOT, capture_output=True, text=True,
        env=profile.os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    names = {line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {"test_lengths", "test_dtypes"} <= names and len(names) >= 3


@pytest.mark.parametrize("what, tool", [("ncu", "ncu"), ("sanitizer", "compute-sanitizer")])
def test_a_missing_tool_is_one_sentence_and_exit_code_2(what, tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profile.shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(sys, "argv", ["profile", what, "--out", str(tmp_path)])
    assert profile.main() == 2
    assert (
        capsys.readouterr().err.strip() == f"{tool}: not installed (it comes with the CUDA toolkit)"
    )


def test_a_missing_gpu_is_one_sentence_and_exit_code_2(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profile.shutil, "which", lambda *args, **kwargs: "/usr/bin/ncu")
    monkeypatch.setattr(profile.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["profile", "ncu", "--out", str(tmp_path)])
    assert profile.main() == 2
    assert capsys.readouterr().err.strip() == "ncu: found, but there is no GPU to run on"
