"""Files of other engines: how each is written, read again and quantised, by its own converter."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

Run = Callable[[Tensor], Sequence[Tensor]]
INPUT, OUTPUT = "images", "logits"


class Format:
    """Format of a file with its engine.

    Attributes:
        suffix: of the file.
        packages: module that is needed -> what to install for it.
        int8_packages: likewise, for int8; `None` where the format has no int8 here.
        fixed: True if the file takes a single image of one size.
    """

    suffix: ClassVar[str]
    packages: ClassVar[Mapping[str, str]]
    int8_packages: ClassVar[Mapping[str, str] | None] = None
    fixed: ClassVar[bool] = False

    def check_packages(self, name: str, int8: bool) -> None:
        """Raise if a package is missing, or the format has no int8.

        Raises:
            ImportError: a package is missing; the message says what to install.
            ValueError: int8 is asked for in a format without it.
        """
        if int8 and self.int8_packages is None:
            able = ", ".join(repr(n) for n, f in FORMATS.items() if f.int8_packages is not None)
            raise ValueError(f"export: no int8 in format {name!r}, only in {able}")
        packages = {**self.packages, **((self.int8_packages or {}) if int8 else {})}
        missing = [module for module in packages if find_spec(module) is None]
        if missing:
            remedies = " ".join(dict.fromkeys(packages[module] for module in missing))
            raise ImportError(
                f"export: format {name!r} needs {' and '.join(missing)}: pip install {remedies}"
            )

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        """Convert a program and write the file, with `metadata` inside."""
        raise NotImplementedError

    def load(self, path: Path) -> Run | None:
        """Return a function that computes the file in float32; `None` without an engine here."""
        raise NotImplementedError

    def nodes(self, path: Path) -> int | None:
        """Return the number of operations in the file's graph; `None` if it has no such graph."""
        return None

    def quantize(self, path: Path, images: Sequence[Tensor]) -> None:
        """Replace the file by one in int8, calibrated by batches of images."""
        raise NotImplementedError


class Onnx(Format):
    """ONNX by PyTorch's exporter, computed and quantised by onnxruntime."""

    suffix = ".onnx"
    packages: ClassVar = dict.fromkeys(
        ("onnx", "onnxscript", "onnxruntime"), "'starlayers[deploy]'"
    )
    int8_packages: ClassVar = {}

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        outputs = len(program.graph_signature.user_outputs)
        names = {0: "batch", 2: "height", 3: "width"} if program.range_constraints else {}
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT] if outputs == 1 else [f"map{i}" for i in range(outputs)],
            dynamic_shapes=(names,),  # the names of sizes that are free already
        )
        _add_metadata(path, metadata)

    def load(self, path: Path) -> Run:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(y) for y in session.run(None, {INPUT: x.numpy()})]

    def nodes(self, path: Path) -> int:
        import onnx

        return len(onnx.load(path, load_external_data=False).graph.node)

    def quantize(self, path: Path, images: Sequence[Tensor]) -> None:
        import onnx
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quant_pre_process,
            quantize_static,
        )

        class Batches(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.batches = iter(images)

            def get_next(self) -> dict[str, Any] | None:
                batch = next(self.batches, None)
                return None if batch is None else {INPUT: batch.numpy()}

        metadata = {p.key: p.value for p in onnx.load(path).metadata_props}
        prepared = path.with_suffix(".prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Batches(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        prepared.unlink()
        _add_metadata(path, metadata)


class OpenVINO(Format):
    """OpenVINO's intermediate representation, quantised by NNCF."""

    suffix = ".xml"
    packages: ClassVar = {"openvino": "'starlayers[openvino]'"}
    int8_packages: ClassVar = {"nncf": "'starlayers[openvino]'"}

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        import openvino

        model = openvino.convert_model(program)
        model.inputs[0].tensor.set_names({INPUT})
        if len(model.outputs) == 1:
            model.outputs[0].tensor.set_names({OUTPUT})
        for key, value in metadata.items():
            model.set_rt_info(value, ["metadata", key])
        openvino.save_model(model, path, compress_to_fp16=False)

    def load(self, path: Path) -> Run:
        import openvino

        # a CPU that has bfloat16 would use it by default
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(path, "CPU", options)
        return lambda x: [torch.from_numpy(y.copy()) for y in compiled(x.numpy()).values()]

    def nodes(self, path: Path) -> int:
        import openvino

        kinds = [op.get_type_name() for op in openvino.Core().read_model(path).get_ops()]
        return sum(kind not in ("Constant", "Parameter", "Result") for kind in kinds)

    def quantize(self, path: Path, images: Sequence[Tensor]) -> None:
        import nncf
        import openvino

        model = openvino.Core().read_model(path)
        batches = nncf.Dataset([batch.numpy() for batch in images])
        log = logging.getLogger("nncf")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            model = nncf.quantize(model, batches, subset_size=len(images))
        finally:
            log.setLevel(level)
        # the weights of the old file are still mapped: write beside it, then replace
        fresh = path.with_name("int8.xml")
        openvino.save_model(model, fresh, compress_to_fp16=False)
        del model
        for suffix in (".bin", ".xml"):
            fresh.with_suffix(suffix).replace(path.with_suffix(suffix))


class AOTInductor(Format):
    """PyTorch's own ahead-of-time compiler: machine code for the CPU of this machine."""

    suffix = ".pt2"
    packages: ClassVar = {}

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        from torch._inductor import aoti_compile_and_package

        options = {"aot_inductor.metadata": dict(metadata)}
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)

    def load(self, path: Path) -> Run:
        from torch._inductor import aoti_load_package
        from torch.utils._pytree import tree_leaves

        compiled = aoti_load_package(str(path))
        return lambda x: tree_leaves(compiled(x))


class ExecuTorch(Format):
    """ExecuTorch for phones and microcontrollers, with XNNPACK's kernels.

    Its memory is planned ahead: with free sizes, release 1.5 plans too little for batches over 15.
    """

    suffix = ".pte"
    packages: ClassVar = {"executorch": "executorch"}
    fixed = True

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        edge = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata)
        )
        path.write_bytes(edge.to_executorch().buffer)

    def load(self, path: Path) -> Run:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")
        return lambda x: [y.clone() for y in method.execute([x])]


class CoreML(Format):
    """Core ML package for Apple's devices.

    Its engine is there alone: elsewhere the file is converted, and not compared.
    """

    suffix = ".mlpackage"
    packages: ClassVar = {"coremltools": "coremltools"}
    fixed = True

    def write(self, program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
        import coremltools

        model = coremltools.convert(
            program.run_decompositions({}),
            convert_to="mlprogram",
            compute_precision=coremltools.precision.FLOAT32,
            minimum_deployment_target=coremltools.target.iOS17,
        )
        model.user_defined_metadata.update(metadata)
        model.save(str(path))

    def load(self, path: Path) -> Run | None:
        import platform

        if platform.system() != "Darwin":
            return None
        import coremltools

        model = coremltools.models.MLModel(str(path))
        (name,) = (i.name for i in model.get_spec().description.input)
        return lambda x: [torch.as_tensor(y) for y in model.predict({name: x.numpy()}).values()]


#: name -> format
FORMATS: dict[str, Format] = {
    "onnx": Onnx(),
    "openvino": OpenVINO(),
    "torch": AOTInductor(),
    "executorch": ExecuTorch(),
    "coreml": CoreML(),
}


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as strings: text as it is, anything else as JSON.

    Raises:
        TypeError: a key is no name, or a value is nothing that JSON can hold.
    """
    text = {}
    for key, value in metadata.items():
        if not (isinstance(key, str) and key.isidentifier()):
            raise TypeError(f"export: metadata needs names such as 'classes' as keys, got {key!r}")
        try:
            text[key] = value if isinstance(value, str) else json.dumps(value)
        except TypeError as error:
            raise TypeError(f"export: metadata {key!r} is nothing for JSON: {error}") from error
    return text


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what converters print and warn of; their errors are raised."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _add_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, dict(metadata))
    onnx.save(model, path)
