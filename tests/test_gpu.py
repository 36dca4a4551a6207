"""What the runner of tests/gpu.py does with jobs that go wrong; drills.py rehearses them all."""

import time

import gpu


def hangs(add_row, options):
    """It hangs"""
    with add_row(what="known before"):
        print("still working ...")
    time.sleep(100)


def fails(add_row, options):
    """It fails"""
    with add_row(what="known before"):
        pass
    raise ValueError("on purpose")


def one_row_fails(add_row, options):
    """One row fails"""
    with add_row(what="bad row"):
        raise KeyError("only this one")
    with add_row(what="good row") as row:
        row |= {"speed": 12345.6, "share": 0.012345, "a|b": "c|d"}
    with add_row(what="optional row"):
        raise ImportError("not installed")


def works(add_row, options):
    """It works"""


def test_jobs_that_go_wrong_are_noted_and_do_not_stop_the_others(tmp_path):
    jobs = {1: (hangs, 3), 2: (fails, 60), 3: (one_row_fails, 60), 4: (works, 60)}
    results = gpu.run_jobs(jobs, gpu.parse(["--out", str(tmp_path)]))
    found = [(title, job["status"]) for title, job in results.items()]
    expected = ("It hangs", "too slow"), ("It fails", "failed"), ("One row fails", "failed")
    expected = [*expected, ("It works", "ok")]
    assert found == [(f"{i}. {what}", how) for i, (what, how) in enumerate(expected, start=1)]
    hung, failed, half, _ = results.values()
    assert hung["outcome"].endswith(" of 3 seconds. still working ...")
    assert failed["outcome"].endswith("ValueError: on purpose")
    assert hung["rows"] == failed["rows"] == [{"what": "known before"}], "that is kept"
    bad, _, optional = half["rows"]
    assert bad["problem"] == "KeyError: 'only this one'" and optional["skipped"] == "not installed"
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| good row |  | 12,346 | 0.0123 | c/d |" in table
    assert "Traceback" in (tmp_path / "log" / "2.txt").read_text(encoding="utf-8")


def test_the_time_limits_add_up_to_nine_minutes():
    assert sum(seconds for _, seconds in gpu.JOBS.values()) <= 9 * 60
