"""Other engines that run ONNX networks on this CPU, as far as they are installed: one call, ready to be timed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Ready = tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]


def engines(model: bytes, x: np.ndarray, threads: int) -> tuple[dict[str, Ready], dict[str, str]]:
    """Those that are installed, ready to run a network.

    Args:
      model: the ONNX file's content.
      x: its input, in the file's own layout.
      threads: to run on.

    Returns:
      {name: (run, outputs)}: a call of `run` computes, `outputs()` is what it then has; and {name: why it cannot run this}.
    """
    ready, failed = dict[str, Ready](), dict[str, str]()
    for name, make in (("onnxruntime", onnx_runtime), ("openvino", openvino)):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            ready[name] = make(model, x, threads)
            ready[name][0]()
        except Exception as error:  # each has its own
            ready.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ready, failed


def onnx_runtime(model: bytes, x: np.ndarray, threads: int) -> Ready:
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
    return lambda: session.run_with_iobinding(binding), binding.copy_outputs_to_cpu


def openvino(model: bytes, x: np.ndarray, threads: int, precision: str = "f32") -> Ready:
    """OpenVINO's CPU plugin, one stream, inputs and outputs in place; a file in eight bits stays so."""
    package = openvino_package()
    network = package.Core().read_model(model, b"")
    network.reshape(list(x.shape))
    request = openvino_request(network, x, threads, precision)
    return (lambda: request.infer(share_outputs=True),
            lambda: [np.array(tensor.data) for tensor in request.output_tensors])


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
