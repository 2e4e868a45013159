"""Runs in the environment of onnxruntime: what its model builder makes of a GPTQ folder.

    python onnxruntime_weights.py FOLDER TARGET WEIGHTS.npz

Builds FOLDER for the CPU into TARGET by the command of the documentation, and saves the weights
[n, k] of every MatMulNBits node in float32, by the node's name, as the operator is specified:
scale * (code - zero point), blocks along a row, low nibble first.
"""

import subprocess
import sys
from pathlib import Path

import numpy
import onnx
from onnx.numpy_helper import to_array


def unpacked(values: numpy.ndarray, bits: int) -> numpy.ndarray:
    """uint8 [..., b] -> the codes in them, lowest bits first: [..., b * 8 / bits]."""
    shifts = numpy.arange(0, 8, bits, dtype=numpy.uint8)
    return ((values[..., None] >> shifts) & (2**bits - 1)).reshape(*values.shape[:-1], -1)


def weight(node: onnx.NodeProto, tensors: dict[str, numpy.ndarray]) -> numpy.ndarray:
    """The weights [n, k] that a MatMulNBits node multiplies by."""
    values = {each.name: each.i for each in node.attribute}
    n, k, bits, block = (values[name] for name in ("N", "K", "bits", "block_size"))
    blocks = k // block
    codes = unpacked(tensors[node.input[1]].reshape(n, blocks, -1), bits).astype(numpy.float32)
    scales = tensors[node.input[2]].reshape(n, blocks, 1).astype(numpy.float32)
    zeros = numpy.float32(2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        stored = tensors[node.input[3]].reshape(n, -1)
        zeros = unpacked(stored, bits)[:, :blocks, None].astype(numpy.float32)
    return (scales * (codes - zeros)).reshape(n, k)


def main(folder: str, target: str, file: str) -> None:
    """Build, read, save."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder]
    command += ["-o", target, "-p", "int4", "-e", "cpu", "-c", str(Path(target) / "scratch")]
    subprocess.run(command, check=True)
    graph = onnx.load(Path(target) / "model.onnx").graph
    tensors = {each.name: to_array(each) for each in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    numpy.savez(file, **{node.name: weight(node, tensors) for node in nodes})


if __name__ == "__main__":
    main(*sys.argv[1:])
