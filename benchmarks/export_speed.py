"""Is an exported encoder faster? Eager, torch.export and ONNX Runtime in turns: CPU milliseconds of a thread per image.

OMP_NUM_THREADS=1 python benchmarks/export_speed.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

from scott_sparse import Encoder, EncoderConfig
from scott_sparse.model.export import WholeImages, export_onnx, exported_program

CASES = {"demo, 64 px": ("demo", 8, 64, 16), "small, 224 px": ("small", 16, 224, 2)}  # size, patch size, side, batch
ROUNDS = 5


@torch.inference_mode()
def measure(size: str, patch_size: int, side: int, batch: int) -> dict[str, list[float]]:
    """CPU milliseconds an image by form, in each of the rounds."""
    encoder, images = (
        Encoder(EncoderConfig.named(size, patch_size=patch_size)).eval(),
        torch.randn(batch, 3, side, side),
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "encoder.onnx")
        export_onnx(encoder, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph, eager, arrays = exported_program(encoder).module(), WholeImages(encoder), {"images": images.numpy()}
    forms = {"eager": lambda: eager(images), "torch.export": lambda: graph(images)}
    forms["ONNX Runtime"] = lambda: session.run(None, arrays)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS + 1):
        for name, run in forms.items():
            started = time.process_time()
            run()
            times[name].append(1000 * (time.process_time() - started) / batch)
    return {name: values[1:] for name, values in times.items()}  # the first round is warm-up


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case, settings in CASES.items():
        for name, values in measure(*settings).items():
            print(
                f"| {case} | {name} | {statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f}) |",
                flush=True,
            )
