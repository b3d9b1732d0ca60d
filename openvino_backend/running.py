"""Call compiled OpenVINO models with torch tensors."""

import threading

import openvino
import torch

TYPES = {
    torch.float32: openvino.Type.f32,
    torch.float16: openvino.Type.f16,
    torch.bfloat16: openvino.Type.bf16,
    torch.float64: openvino.Type.f64,
    torch.int64: openvino.Type.i64,
    torch.int32: openvino.Type.i32,
    torch.int16: openvino.Type.i16,
    torch.int8: openvino.Type.i8,
    torch.uint8: openvino.Type.u8,
    torch.bool: openvino.Type.boolean,
}


class TensorRequest:
    """An inference request of a compiled model. It takes torch tensors and returns new ones, one call at a time."""

    def __init__(self, compiled: openvino.CompiledModel) -> None:
        dtypes = {openvino_type: dtype for dtype, openvino_type in TYPES.items()}
        self._request = compiled.create_infer_request()
        self._outputs = [
            (None if port.partial_shape.is_dynamic else tuple(port.shape), dtypes[port.element_type])
            for port in compiled.outputs
        ]
        self._kept: tuple[torch.Tensor, ...] = ()
        self._lock = threading.Lock()

    def __call__(
        self, *inputs: torch.Tensor, kept: tuple[torch.Tensor, ...] = ()
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return the results, in memory that no later call touches.

        Args:
            kept: further contiguous inputs. The tuple of the last call is not set again.
        """
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        outputs = [None if shape is None else torch.empty(shape, dtype=dtype) for shape, dtype in self._outputs]
        with self._lock:
            for index, tensor in enumerate(inputs):
                self._request.set_input_tensor(index, share_memory(tensor))
            if kept is not self._kept:
                for index, tensor in enumerate(kept, start=len(inputs)):
                    self._request.set_input_tensor(index, share_memory(tensor))
                self._kept = kept
            for index, tensor in enumerate(outputs):
                if tensor is not None:
                    self._request.set_output_tensor(index, share_memory(tensor))
            self._request.infer()
            results = tuple(self._copy(index) if each is None else each for index, each in enumerate(outputs))
        return results[0] if len(results) == 1 else results

    def _copy(self, index: int) -> torch.Tensor:
        """Return a result of dynamic size."""
        memory, (_, dtype) = self._request.get_output_tensor(index).data, self._outputs[index]
        return torch.from_numpy(memory.copy()).view(dtype)


def share_memory(tensor: torch.Tensor) -> openvino.Tensor:
    """Return an OpenVINO tensor over a contiguous torch tensor's memory. The torch tensor must outlive it."""
    raw = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
    return openvino.Tensor(raw.numpy(), openvino.Shape(list(tensor.shape)), TYPES[tensor.dtype])
