"""Other engines that run ONNX networks on this CPU, as far as they are installed: one call, ready to be timed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from sparseflax.job.quantized import quantized

SAID = 300  # characters of an engine's error


class Engine(NamedTuple):
    """A network in another engine.

    Attributes:
      run: computes.
      outputs: what it then has.
      exact: False where it computes in fewer bits than float32.
    """

    run: Callable[[], Any]
    outputs: Callable[[], list[np.ndarray]]
    exact: bool = True


def engines(model: bytes, x: np.ndarray, threads: int,
            examples: np.ndarray | None = None) -> tuple[dict[str, Engine], dict[str, str]]:
    """Those that are installed, ready to run a network: in float32, and in fewer bits where they take them unasked.

    Args:
      model: the ONNX file's content.
      x: its input, in the file's own layout.
      threads: to run on.
      examples: inputs by which its ranges are found, to have it in eight bits as well; or None.

    Returns:
      {name: engine}, and {name: why it cannot run this}.
    """
    @cache
    def in_int8() -> bytes:
        assert examples is not None
        return quantized(model, examples, len(x))

    ready, failed, makers = dict[str, Engine](), dict[str, str](), dict[str, Callable[[], Engine]]()
    if importlib.util.find_spec("onnxruntime") is not None:
        makers["onnxruntime"] = lambda: onnx_runtime(model, x, threads)
        if examples is not None:
            makers["onnxruntime int8"] = lambda: onnx_runtime(in_int8(), x, threads)._replace(exact=False)
    if importlib.util.find_spec("openvino") is not None:
        makers["openvino"] = lambda: openvino(model, x, threads)
        if unasked := openvino_unasked():
            makers[f"openvino {unasked}"] = lambda: openvino(model, x, threads, unasked)
        if "onnxruntime int8" in makers:  # whose tool makes the file
            makers["openvino int8"] = lambda: openvino(in_int8(), x, threads)._replace(exact=False)
    for name, make in makers.items():
        try:
            ready[name] = make()
            ready[name].run()
        except Exception as error:  # each has its own
            ready.pop(name, None)
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
    return ready, failed


def onnx_runtime(model: bytes, x: np.ndarray, threads: int) -> Engine:
    """ONNX Runtime on its CPU provider, input and outputs bound: it fuses and blocks layouts itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it disturbs whoever is timed next
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)  # tells the shapes; from here on outputs lie where they lie
    for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(output.name, value)
    return Engine(lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu)


def openvino(model: bytes, x: np.ndarray, threads: int, precision: str = "f32") -> Engine:
    """OpenVINO's CPU plugin, one stream, inputs and outputs in place; a file in eight bits stays so."""
    package = openvino_package()
    network = package.Core().read_model(model, b"")
    network.reshape(list(x.shape))
    request = openvino_request(network, x, threads, precision)
    return Engine(lambda: request.infer(share_outputs=True),
                  lambda: [np.array(tensor.data) for tensor in request.output_tensors], precision == "f32")


def openvino_unasked() -> str:
    """"bf16" or "f16", where this CPU has instructions for it and OpenVINO takes them unless told otherwise; else ""."""
    precision = openvino_package().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    return "" if precision in ("f32", "dynamic", "undefined") else precision


def openvino_request(network: Any, x: np.ndarray, threads: int, precision: str = "f32") -> Any:
    """An inference request of an openvino.Model for the input x, in its own layout."""
    # Without the first it would compute in bfloat16 where the CPU can; without the last it would move our threads.
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    package = openvino_package()
    request = package.compile_model(network, "CPU", settings).create_infer_request()
    request.set_input_tensor(package.Tensor(x))
    return request


def openvino_package() -> Any:  # its stubs lack what it exports
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing openvino would report it home
    import openvino  # pyright: ignore[reportMissingImports]
    import openvino.opset13  # pyright: ignore[reportMissingImports]

    return openvino
