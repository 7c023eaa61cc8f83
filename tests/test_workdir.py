"""The run directory: refusals, strict JSON, round trips, and readability after an interruption."""

import csv
import dataclasses
import datetime
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rnnjax.metrics import MetricsWriter, read_metrics
from rnnjax.serialization import format_table
from rnnjax.workdir import Workdir, WorkdirError


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def workdir(tmp_path):
    return Workdir.create(tmp_path / "run")


def git(directory, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


def test_create_makes_parents_and_accepts_an_empty_directory(tmp_path, monkeypatch):
    assert Workdir.create(tmp_path / "a" / "b").path.is_dir()
    (tmp_path / "empty").mkdir()
    Workdir.create(str(tmp_path / "empty"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workdir.create("~/home_run").path == tmp_path / "home_run"


def test_earlier_results_are_refused_and_untouched(workdir):
    workdir.save_arrays("spectrum", a=np.ones(3))
    before = {file.name: file.read_bytes() for file in workdir.path.iterdir()}
    with pytest.raises(WorkdirError, match=r"workdir must be empty or not exist yet, got .*run, which holds"):
        Workdir.create(workdir.path)
    assert {file.name: file.read_bytes() for file in workdir.path.iterdir()} == before
    assert issubclass(WorkdirError, ValueError)


def test_overwrite_removes_an_earlier_run_only(workdir, tmp_path):
    (workdir.path / "checkpoints").mkdir()
    (workdir.path / "checkpoints" / "1").write_text("")
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    (workdir.path / "link").symlink_to(kept)
    Workdir.create(workdir.path, overwrite=True)
    assert [file.name for file in workdir.path.iterdir()] == ["environment.json"]
    with pytest.raises(WorkdirError, match="must hold an earlier run to be overwritten"):
        Workdir.create(kept, overwrite=True)
    assert (kept / "file").read_text() == "mine"


def test_paths_that_cannot_be_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("data")
    with pytest.raises(WorkdirError, match="workdir must be a directory, got the file"):
        Workdir.create(file, overwrite=True)
    with pytest.raises(WorkdirError, match=r"workdir must be a directory that can be written to, got .*below"):
        Workdir.create(file / "below")
    assert file.read_text() == "data"
    for path in ("", None, 3):
        with pytest.raises(WorkdirError, match="workdir must be the path of a directory, got"):
            Workdir.create(path)


def test_unwritable_directory_is_refused_by_a_trial_write(tmp_path, monkeypatch):
    real_open = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if "r" not in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return real_open(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(WorkdirError, match=r"can be written to, got .*Permission denied"):
        Workdir.create(tmp_path / "run")


def test_read_only_file_system():
    with pytest.raises(WorkdirError, match="workdir must be a directory that can be written to, got /proc"):
        Workdir.create("/proc/run")


@dataclasses.dataclass(frozen=True)
class Inner:
    gain: float = 1.5


@dataclasses.dataclass(frozen=True)
class Config:
    cell: str = "lstm"
    sizes: tuple[int, ...] = (3, 4)
    inner: Inner = Inner()
    clip_norm: float | None = None
    bound: float = math.inf
    path: Path = Path("a/b")


def test_config(workdir):
    workdir.write_config(Config(), num_params=jnp.int32(7), scales=np.array([0.5, np.nan]))
    assert strict_json((workdir.path / "config.json").read_text()) == {
        "cell": "lstm",
        "sizes": [3, 4],
        "inner": {"gain": 1.5},
        "clip_norm": None,
        "bound": {"float": "inf"},
        "path": "a/b",
        "num_params": 7,
        "scales": [0.5, {"float": "nan"}],
    }
    for config in (Config, 3, "lstm"):
        with pytest.raises(ValueError, match="config must be a dataclass instance or a mapping, got"):
            workdir.write_config(config)
    with pytest.raises(ValueError, match="activation must be numbers, strings"):
        workdir.write_config({"activation": jnp.tanh})
    assert strict_json((workdir.path / "config.json").read_text())["cell"] == "lstm"


def test_environment(workdir):
    environment = strict_json((workdir.path / "environment.json").read_text())
    assert environment["versions"]["jax"] == jax.__version__
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["versions"]["python"] == sys.version.split()[0]
    assert {"rnnjax", "jaxlib", "flax", "optax"} < environment["versions"].keys()
    assert environment["platform"] == jax.default_backend()
    assert environment["device_kind"] == jax.devices()[0].device_kind
    assert (environment["num_devices"], environment["cpu_count"]) == (len(jax.devices()), os.cpu_count())
    assert shlex.split(environment["command_line"]) == sys.orig_argv
    start = datetime.datetime.fromisoformat(environment["start_time"])
    assert start.utcoffset() == datetime.timedelta(0)
    assert abs((datetime.datetime.now(datetime.UTC) - start).total_seconds()) < 600


def test_git_commit_of_the_current_directory(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(checkout)

    def recorded(name):
        return strict_json((Workdir.create(tmp_path / name).path / "environment.json").read_text())["git_commit"]

    assert recorded("no_checkout") is None
    git(checkout, "init", "-q")
    assert recorded("no_commit") is None
    (checkout / "code.py").write_text("1")
    git(checkout, "add", "code.py")
    git(checkout, "commit", "-q", "-m", "first")
    (checkout / "results").write_text("untracked")
    commit = git(checkout, "rev-parse", "HEAD")
    assert recorded("clean") == commit and len(commit) == 40
    (checkout / "code.py").write_text("2")
    assert recorded("changed") == commit + "+dirty"
    monkeypatch.setenv("PATH", "")
    assert recorded("no_git") is None


def test_metrics_round_trip_strict_json(workdir):
    rows = {
        "loss": jnp.float32(0.25),
        "norm": math.inf,
        "lowest": np.float64(-np.inf),
        "half": jnp.bfloat16(1.5),
        "count": np.int64(2**40),
        "flag": np.bool_(True),
        "nothing": None,
        "regime": "vanishing",
        "exponents": jnp.array([[-0.5, -jnp.inf], [jnp.nan, 2.0]]),
        "lags": [1, 2.5, np.float32(4)],
    }
    with MetricsWriter(workdir.path) as writer:
        writer.write(jnp.int32(3), seconds=1.5, **rows)
        writer.write(step=4, loss=math.nan)
    lines = (workdir.path / "metrics.jsonl").read_text().splitlines()
    assert [strict_json(line)["step"] for line in lines] == [3, 4]
    first, second = read_metrics(workdir.path / "metrics.jsonl")
    nan = first["exponents"][1].pop(0)
    assert math.isnan(nan) and math.isnan(second["loss"])
    assert 0 <= second["seconds"] < 600
    assert first == {
        "step": 3,
        "seconds": 1.5,
        "loss": 0.25,
        "norm": math.inf,
        "lowest": -math.inf,
        "half": 1.5,
        "count": 2**40,
        "flag": True,
        "nothing": None,
        "regime": "vanishing",
        "exponents": [[-0.5, -math.inf], [2.0]],
        "lags": [1, 2.5, 4.0],
    }
    assert first["flag"] is True


@pytest.mark.parametrize(
    "value", [object(), 1j, np.zeros(5000), np.array([1j]), np.array([None]), jnp.tanh, {"a": {1}}, [object()]]
)
def test_a_value_that_is_no_metric_is_named_and_nothing_is_written(workdir, value):
    name = "a" if isinstance(value, dict) else "my_metric"
    with MetricsWriter(workdir.path) as writer:
        with pytest.raises(ValueError, match=f"{name} must"):
            writer.write(0, loss=1.0, my_metric=value)
        with pytest.raises(ValueError, match="my_metric must be an array of numbers"):
            writer.write(0, my_metric=jax.random.key(0))
        with pytest.raises(ValueError, match="step must be a non-negative integer, got -1"):
            writer.write(-1, loss=1.0)
    assert (workdir.path / "metrics.jsonl").read_text() == ""


def test_metrics_under_jit_are_refused(workdir):
    with MetricsWriter(workdir.path) as writer, pytest.raises(ValueError, match="loss must be an array of numbers"):
        jax.jit(lambda loss: writer.write(0, loss=loss))(1.0)


def test_metrics_are_on_disk_after_each_line_and_never_overwritten(workdir):
    writer = MetricsWriter(workdir.path)
    writer.write(0, loss=1.0)
    assert read_metrics(workdir.path / "metrics.jsonl")[0]["loss"] == 1.0
    with pytest.raises(WorkdirError, match=r"path must be a directory without metrics\.jsonl"):
        MetricsWriter(workdir.path)
    writer.close()
    writer.close()
    with pytest.raises(WorkdirError, match="before close"):
        writer.write(1, loss=1.0)
    assert len(read_metrics(workdir.path / "metrics.jsonl")) == 1
    with pytest.raises(WorkdirError, match="No such file or directory"):
        MetricsWriter(workdir.path / "missing")


def test_a_killed_run_stays_readable(workdir):
    program = (
        "import os, signal, sys\n"
        "from rnnjax.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(3): writer.write(step, loss=float('inf'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", program, str(workdir.path)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    path = workdir.path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(0, math.inf), (1, math.inf), (2, math.inf)]
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl line 4"):
        read_metrics(path)


def test_tensorboard_scalars(workdir):
    pytest.importorskip("tensorboardX")
    with MetricsWriter(workdir.path, tensorboard=True) as writer:
        writer.write(5, loss=jnp.float32(0.25), accuracy=0.5, regime="critical", flag=True, lags=np.ones(3))
        writer.write(6, loss=math.nan)
    writer.close()
    scalars = [(value.tag, step, value.simple_value) for step, value in events(workdir.path / "tensorboard")]
    assert scalars[:2] == [("loss", 5, 0.25), ("accuracy", 5, 0.5)]
    assert scalars[2][:2] == ("loss", 6) and math.isnan(scalars[2][2]) and len(scalars) == 3


def events(directory):
    """Yields (step, value) from TFRecords: length (8 bytes), checksum (4), an Event message, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    (file,) = directory.glob("events*")
    data = file.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        yield from ((event.step, value) for value in event.summary.value)
        data = data[12 + length + 4 :]


def test_missing_tensorboard_names_the_extra(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"needs tensorboardX; install rnnjax with its extra \[experiments\]"):
        MetricsWriter(workdir.path, tensorboard=True)
    MetricsWriter(workdir.path).close()


def test_arrays_round_trip(workdir):
    arrays = {
        "spectrum": np.array([[-np.inf, np.nan], [1.0, 2.0]]),
        "steps": jnp.arange(3),
        "low": jnp.array([1.5, -3.0], jnp.bfloat16),
        "names": ["LSTM", "GRU"],
        "file": 1.0,
        "allow_pickle": True,
    }
    workdir.save_arrays("final", **arrays)
    loaded = workdir.load_arrays("final")
    assert loaded.keys() == arrays.keys()
    np.testing.assert_array_equal(loaded["spectrum"], arrays["spectrum"])
    np.testing.assert_array_equal(loaded["low"], np.array([1.5, -3.0], np.float32))
    assert loaded["low"].dtype == np.float32 and loaded["steps"].dtype == arrays["steps"].dtype
    assert loaded["names"].tolist() == ["LSTM", "GRU"] and loaded["file"] == 1.0
    with np.load(workdir.path / "final.npz") as plain:
        np.testing.assert_array_equal(plain["steps"], [0, 1, 2])
    workdir.save_arrays("zeros", a=np.zeros(100_000))
    assert (workdir.path / "zeros.npz").stat().st_size < 10_000


def test_an_interrupted_save_leaves_the_earlier_arrays(workdir, monkeypatch):
    workdir.save_arrays("final", a=np.ones(3))
    written = np.lib.format.write_array

    def interrupted(file, array, **options):
        written(file, array, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(np.lib.format, "write_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workdir.save_arrays("final", a=np.zeros(3))
    np.testing.assert_array_equal(workdir.load_arrays("final")["a"], np.ones(3))
    assert sorted(file.name for file in workdir.path.iterdir()) == ["environment.json", "final.npz"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden", "..", 3])
def test_bad_names(workdir, name):
    for use in (workdir.save_arrays, workdir.load_arrays, lambda name: workdir.write_table(name, [{"a": 1}])):
        with pytest.raises(WorkdirError, match="name must be a file name"):
            use(name)


def test_bad_arrays(workdir):
    for value in (object(), jnp.tanh, jax.random.key(0), [[1], [2, 3]]):
        with pytest.raises(ValueError, match="bad must be an array of numbers"):
            workdir.save_arrays("final", good=np.ones(2), bad=value)
    workdir.save_arrays("first", a=1.0)
    with pytest.raises(WorkdirError, match=r"name must be that of saved arrays \(first\), got 'final'"):
        workdir.load_arrays("final")


ROWS = [
    {"cell": "LSTM", "exponent": -0.0123456, "steps": 123456, "log_norm": np.float32(-2841.25)},
    {"cell": "vanilla", "exponent": jnp.float32(jnp.nan), "steps": 7, "log_norm": -math.inf, "late": 54321.6},
]


def test_format_table():
    assert format_table(ROWS).splitlines() == [
        "cell     exponent   steps  log_norm   late",
        "-------  --------  ------  --------  -----",
        "LSTM     -0.01235  123456     -2841",
        "vanilla       nan       7      -inf  54322",
    ]
    for rows in ([], [{}], [1]):
        with pytest.raises(ValueError, match="rows must be a non-empty list of non-empty dicts"):
            format_table(rows)


def test_write_table_keeps_full_precision_in_csv(workdir):
    assert workdir.write_table("summary", ROWS) == format_table(ROWS)
    assert (workdir.path / "summary.txt").read_text() == format_table(ROWS) + "\n"
    with (workdir.path / "summary.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["cell"], float(first["exponent"]), int(first["steps"])) == ("LSTM", -0.0123456, 123456)
    assert float(first["log_norm"]) == -2841.25 and first["late"] == ""
    assert math.isnan(float(second["exponent"])) and float(second["log_norm"]) == -math.inf
    assert float(second["late"]) == 54321.6
