"""What the runner of tests/gpu.py does with jobs that go wrong; drills.py rehearses it all."""

import argparse
import json
from pathlib import Path

import gpu

PROGRAM = """
import sys
import time

sys.path.insert(0, {tests!r})
import gpu


def fails(report, options):
    raise ValueError("on purpose")


def ends(report, options):
    raise SystemExit("on purpose, too")


def hangs(report, options):
    report.row(what="known before").__enter__()
    time.sleep(100)


def works(report, options):
    with report.row(what="one row fails"):
        raise KeyError("only this one")
    with report.row(what="another works") as row:
        row["speed"] = 12345.6


JOBS = {{function.__name__: (1, function) for function in (fails, ends, hangs, works)}}
if __name__ == "__main__":
    gpu.follow(gpu.parse(sys.argv[1:]), JOBS)
"""


def test_jobs_that_go_wrong_are_noted_and_do_not_stop_the_others(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(Path(gpu.__file__).parent)), encoding="utf-8")
    options = gpu.parse(["--out", str(tmp_path / "out")])
    options.work = tmp_path
    jobs = dict.fromkeys(("fails", "ends", "hangs", "works"), (1, None))
    rounds = [(4, [["hangs"], ["fails", "ends"]]), (20, [["works"]])]
    results = gpu.run_rounds(rounds, jobs, options, {}, program)
    status = {name: job["status"] for name, job in results.items()}
    assert status == {"hangs": "too slow", "fails": "failed", "ends": "failed", "works": "failed"}
    assert results["fails"]["problem"] == "ValueError: on purpose"
    assert results["ends"]["problem"] == "SystemExit: on purpose, too"
    assert results["hangs"]["rows"] == [{"what": "known before"}], "what it had found is kept"
    assert results == json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))
    table = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert "| another works | 12,346 |  |" in table and "KeyError: 'only this one'" in table
    assert (
        "hangs: too slow" in table and "Traceback" in (tmp_path / "out/log/fails.txt").read_text()
    )


def test_without_a_gpu_it_says_so_and_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "missing_data", lambda options: [])
    options = gpu.parse(["--out", str(tmp_path)])
    assert gpu.lead(options) == 1
    assert "`--rehearse` needs none" in (tmp_path / "gpu.md").read_text(encoding="utf-8")


def test_the_time_limits_add_up_to_nine_minutes():
    planned = [name for _, lanes in gpu.ROUNDS for lane in lanes for name in lane]
    assert sorted(planned) == sorted(gpu.JOBS.keys() - {"download"})
    assert sum(seconds for seconds, _ in gpu.ROUNDS) <= 9 * 60
    some = gpu.rounds_of(argparse.Namespace(rehearse=False, steps=[5]))
    assert [lanes for _, lanes in some] == [[["machine"]], [["steps"]]]


def test_numbers_have_three_digits():
    values = 12345.6, 45.67, 1.234, 0.0123, 0.00001, 0.0, 7, True, None, "a|b"
    words = "12,346", "45.7", "1.23", "0.0123", "1.0e-05", "0", "7", "yes", "", "a/b"
    assert tuple(map(gpu.in_words, values)) == words
