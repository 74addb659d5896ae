"""StarNets in other engines on one CPU thread: our exported graph, timm's, and PyTorch itself."""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from benchmarks.harness.report import conditions, first_definition
from benchmarks.harness.runner import Job, Records, current
from benchmarks.harness.study import Study
from benchmarks.harness.timing import cpu_clock, in_turn
from benchmarks.vision.engine_tables import (
    accuracy_table,
    choice,
    gain_table,
    graph_table,
    pair_table,
    promise,
    ratio_table,
)
from starlayers import vision
from starlayers.vision import portable, to_timm_state_dict
from starlayers.vision.deploy.exporting import capture, relative
from starlayers.vision.deploy.formats import FORMATS, quiet

NAME = "vision-engines"
#: what all times are divided by
BASELINE = ("onnxruntime", "float32", "timm")
#: engine and precision -> file that it computes
FILES = {
    ("onnxruntime", "float32"): ".onnx",
    ("onnxruntime", "int8"): ".int8.onnx",
    ("OpenVINO", "float32"): ".xml",
    ("OpenVINO", "bfloat16"): ".xml",
    ("OpenVINO", "int8"): ".int8.xml",
}
GRAPHS = ("timm", "ours")
#: precision -> largest difference to timm's network, relative to the largest output
LIMITS = {"float32": 1e-4, "bfloat16": 0.1, "int8": 1.0}
#: the recipe of `make demo` when this was measured: it has no mirrored images now
DEMO = {
    "epochs": 4,
    "batch_size": 128,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "flip": 0.5,
    "ema": 0.998,
}
#: its network: the demo's has a stem of stride 1 now
DEMO_NET = {"stage_strides": [1, 2, 2, 1], "kernel_size": 3}
TEXT = """\
## Speed: StarNet in other engines

**What was done.** StarNets at {image}x{image}, batch {batches}, on one thread. Times are CPU time
of the process, so that other work on the machine does not count. All engines of a network and batch
run in turn, in one process, after a check that their outputs agree. An engine's turn is two calls,
the second of which is timed: the first evicts the engine before it. A ratio is the median over
{rounds} rounds of the ratio within the round, with its quartiles, to onnxruntime on timm's graph in
float32. Ours is the graph that `starlayers.vision.export` writes; both graphs have free batch and
size. int8 is static, by onnxruntime's quantiser and by NNCF. bfloat16 is OpenVINO's default on
CPUs that compute in it.

{ratios}
Our graph over timm's in the same engine:

{pairs}
The ONNX graphs:

{graphs}
**What this shows.**

- *Other engines are faster than PyTorch.* How many times as fast they are with our graph as the
  fastest of PyTorch's eager ways (timm's network, ours, ours with `fuse()`):

<!-- --8<-- [start:engines] -->
{gains}
{choice}
<!-- --8<-- [end:engines] -->

- *Our graph against timm's:* {promise}
- *int8 costs little accuracy.* StarNet-S050, trained as `make demo` trains it and calibrated with
  {calibration} training images of Fashion-MNIST, classifies its {test} test images so:

{accuracies}
**Conditions**

{conditions}
The accuracies:

{accuracy_conditions}
"""


def job(smoke: bool = False) -> Job:
    """Make the job: networks, batches, image and rounds."""
    common = {"arm": None, "seed": None, "smoke": smoke, "clock": "CPU, second of two calls"}
    if smoke:
        return {**common, "models": ["starnet_s050"], "image": 64, "rounds": {"2": 2}}
    rounds = {"1": 41, "32": 9}
    return {**common, "models": ["starnet_s1", "starnet_s4"], "image": 224, "rounds": rounds}


def work(job: Job) -> dict[str, Any]:
    """Write the files of each network, and time each batch size in a process of its own."""
    torch.set_num_threads(1)  # as the processes do: the record has this number
    rows: list[dict[str, Any]] = []
    graphs: dict[str, Any] = {}
    for model in job["models"]:
        with tempfile.TemporaryDirectory() as folder:
            graphs[model] = write(model, job["image"], Path(folder))
            for batch in job["rounds"]:
                command = [sys.executable, "-m", "benchmarks.vision.engines", json.dumps(job)]
                command += [model, batch, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rows += json.loads(done.stdout.splitlines()[-1])
    return {"rows": rows, "graphs": graphs}


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Return our network and timm's with the same weights, in eval mode."""
    torch.manual_seed(0)
    ours = getattr(vision, name)().eval()
    theirs = timm.create_model(name).eval()
    theirs.load_state_dict(to_timm_state_dict(ours))
    return ours, theirs


def write(name: str, image: int, folder: Path) -> dict[str, dict[str, int]]:
    """Write both graphs in every format, and count the operations of the ONNX graphs."""
    import onnx

    for format_name in ("onnx", "openvino"):
        FORMATS[format_name].check_packages(format_name, int8=True)
    ours, theirs = networks(name)
    shape = (3, image, image)
    generator = torch.Generator().manual_seed(0)
    calibration = [torch.randn(1, *shape, generator=generator) for _ in range(8)]
    counts = {}
    for graph, model in (("timm", theirs), ("ours", portable(ours)), ("ours, not portable", ours)):
        program = capture(model, shape)
        with quiet():
            for format_name in ("onnx", "openvino"):
                target = FORMATS[format_name]
                file = folder / f"{graph}{target.suffix}"
                target.write(program, file, {})
                if graph not in GRAPHS:
                    continue
                quantised = file.with_suffix(f".int8{target.suffix}")
                target.write(program, quantised, {})
                target.quantize(quantised, calibration)
            if graph == "ours":
                FORMATS["torch"].write(program, folder / "ours.pt2", {})
        operations = Counter(n.op_type for n in onnx.load(folder / f"{graph}.onnx").graph.node)
        counts[graph] = {"nodes": operations.total(), "transposes": operations["Transpose"]}
    return counts


def engines(name: str, x: Tensor, folder: Path) -> dict[tuple[str, str, str], Callable[[], Tensor]]:
    """Return (engine, precision, graph) -> function that computes the batch `x`, one thread."""
    ours, theirs = networks(name)
    last = x.contiguous(memory_format=torch.channels_last)
    theirs = theirs.to(memory_format=torch.channels_last)
    made = {
        ("PyTorch", "float32", "timm"): _eager(theirs, last),
        ("PyTorch", "float32", "ours"): _eager(ours, last),
        ("PyTorch", "float32", "ours, fuse()"): _eager(copy.deepcopy(ours).fuse(), last),
        ("AOTInductor", "float32", "ours"): _compiled(folder / "ours.pt2", x),
    }
    for (engine, precision), suffix in FILES.items():
        for graph in GRAPHS:
            make = _onnxruntime if engine == "onnxruntime" else _openvino
            made[engine, precision, graph] = make(folder / f"{graph}{suffix}", x, precision)
    return made


def _eager(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return run


def _compiled(file: Path, x: Tensor) -> Callable[[], Tensor]:
    load = FORMATS["torch"].load(file)
    assert load is not None
    return lambda: load(x)[0]


def _onnxruntime(file: Path, x: Tensor, precision: str) -> Callable[[], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {"images": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(file: Path, x: Tensor, precision: str) -> Callable[[], Tensor]:
    import openvino

    hint = "bf16" if precision == "bfloat16" else "f32"
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": hint}
    compiled = openvino.Core().compile_model(file, "CPU", options)
    images = x.numpy()
    return lambda: torch.from_numpy(compiled(images)[0].copy())


def measure(job: Job, name: str, batch: str, folder: Path) -> list[dict[str, Any]]:
    """Time all engines in turn."""
    torch.set_num_threads(1)
    size, rounds = job["image"], job["rounds"][batch]
    x = torch.randn(int(batch), 3, size, size, generator=torch.Generator().manual_seed(1))
    runs = engines(name, x, folder)
    check(runs)
    labelled = {" | ".join(key): run for key, run in runs.items()}
    times = in_turn(labelled, repeats=rounds, warmup=2, clock=second_call)
    return summarise({"model": name, "batch": int(batch)}, times)


def second_call(run: Callable[[], object]) -> float:
    """Return the CPU seconds of the second of two calls: the first evicts the engine before it."""
    run()
    return cpu_clock(run)


def check(runs: dict[tuple[str, str, str], Callable[[], Tensor]]) -> None:
    """Raise where an engine computes something else than timm: no timing of a wrong result."""
    wanted = runs["PyTorch", "float32", "timm"]()
    for key, run in runs.items():
        difference = relative(run(), wanted)
        if not difference <= LIMITS[key[1]]:
            raise RuntimeError(f"{', '.join(key)} differs by {difference:.2g}")


def summarise(run: dict[str, Any], times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return a row for each engine: median time, and quartiles of its ratios within the rounds."""
    rows = []
    for label, seconds in times.items():
        engine, precision, graph = label.split(" | ")
        row = {**run, "engine": engine, "precision": precision, "graph": graph}
        row["median_ms"] = 1e3 * statistics.median(seconds)
        row["ratio"] = quartiles(seconds, times[" | ".join(BASELINE)])
        peer = f"{engine} | {precision} | timm"
        row["to_timm"] = quartiles(seconds, times[peer]) if peer in times else None
        rows.append(row)
    return rows


def quartiles(times: list[float], baseline: list[float]) -> list[float]:
    """Return the quartiles of the ratios within the rounds."""
    return statistics.quantiles((a / b for a, b in zip(times, baseline, strict=True)), n=4)


def accuracy_job(smoke: bool = False) -> Job:
    """Make the job that trains a network and quantises it."""
    size = {"train": 512, "test": 256} if smoke else {"train": None, "test": None}
    recipe = {**DEMO, **({"epochs": 1, "ema": 0.0} if smoke else {})}
    net = {"model": "starnet_s050", **DEMO_NET}
    return {"arm": None, "seed": 0, "recipe": recipe, "net": net, "calibration": 300, **size}


def accuracy(job: Job) -> dict[str, Any]:
    """Train as `make demo` does, and return the accuracy of each int8 file."""
    from benchmarks.harness.images import benchmark_images
    from starlayers.vision.training import RunDir, TrainConfig, train

    torch.set_num_threads(1)
    data = benchmark_images(train=job["train"], test=job["test"])
    torch.manual_seed(job["seed"])
    options = dict(job["net"])
    net = getattr(vision, options.pop("model"))(in_chans=1, num_classes=10, **options)
    config = TrainConfig(**job["recipe"], seed=job["seed"])
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))

    def images(part: Any, numbers: range) -> tuple[Tensor, Tensor]:
        pixels, classes = zip(*(part[i] for i in numbers), strict=True)
        return (torch.stack(pixels).float() / 255 - mean) / std, torch.tensor(classes)

    n: int = len(data.train)  # type: ignore[arg-type]
    calibration, _ = images(data.train, range(0, n, max(1, n // job["calibration"])))
    test = images(data.test, range(len(data.test)))  # type: ignore[arg-type]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        train(net, data, config, RunDir(f"{folder}/run", {}), progress=False)
        vision.load_checkpoint(net, f"{folder}/run/model.safetensors")  # averaged weights
        for name in ("onnx", "openvino"):
            path = f"{folder}/net{FORMATS[name].suffix}"
            report = vision.export(net, path, shape=data.shape, int8=calibration, labelled=test)
            assert report.accuracy is not None
            results[name] = {
                "float32": report.accuracy[0],
                "int8": report.accuracy[1],
                "difference": report.int8_difference,
                "agreement": report.agreement,
            }
    return {"results": results, "calibration": len(calibration), "test": len(test[1])}


def tables(records: Records) -> str:
    """Make the tables that the command prints."""
    (record,) = records.values()
    metrics = record.metrics
    return "\n".join(
        [
            ratio_table(metrics["rows"]),
            pair_table(metrics["rows"]),
            graph_table(metrics["graphs"]),
            gain_table(metrics["rows"]),
            choice(metrics["rows"]),
            promise(metrics["rows"]),
        ]
    )


def text(records: Records) -> str:
    """Make the page of the engines."""
    (record,) = records.values()
    rows, definition = record.metrics["rows"], first_definition(records)
    quantised = current(NAME, ACCURACY.jobs())["accuracy"]
    return TEXT.format(
        image=definition["image"],
        batches=" and ".join(definition["rounds"]),
        rounds=" and ".join(map(str, definition["rounds"].values())),
        ratios=ratio_table(rows),
        pairs=pair_table(rows),
        graphs=graph_table(record.metrics["graphs"]),
        gains=gain_table(rows),
        choice=choice(rows),
        promise=promise(rows),
        calibration=quantised.metrics["calibration"],
        test=quantised.metrics["test"],
        accuracies=accuracy_table(quantised.metrics),
        conditions=conditions([record]),
        accuracy_conditions=conditions([quantised]),
    )


STUDY = Study(
    NAME, "python -m benchmarks.vision engines", lambda: {"engines": job()}, work, tables, text
)
ACCURACY = Study(
    NAME,
    "python -m benchmarks.vision engines",
    lambda: {"accuracy": accuracy_job()},
    accuracy,
    lambda records: accuracy_table(next(iter(records.values())).metrics),
    lambda _: "",
)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))))
