"""A slice of the fuzzer of ops; the rest by hand, see harness.py. Its cases are always the same."""

from pathlib import Path

CALLS = 700


def test_a_slice_of_random_calls(run_python):
    done = run_python(Path(__file__).with_name("ops.py"), "--calls", CALLS, "--seed", 20, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith(f"{CALLS} calls, 0 failures"), done.stdout
    assert int(done.stdout.split("  matched\n")[0].split()[-1]) > CALLS // 4, done.stdout
