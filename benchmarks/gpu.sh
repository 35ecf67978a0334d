#!/usr/bin/env bash
# Parity, speed and a short training on what is here, a GPU or else the CPU, in under nine minutes on one H100, as one JSON.
#
#     benchmarks/gpu.sh [FILE]        # default gpu.json; PYTHON names another interpreter
#
# Parity: engines against each other and the golden numbers, on each device. Speed: benchmarks/tokenizer.py and step.py. Training:
# the demo's recipe for two epochs and its k-NN table, then killed and resumed with --deterministic and compared bit for bit.
set -euo pipefail
python=${PYTHON:-python}
file=$(realpath "${1:-gpu.json}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
try() { "${@:2}" || failed+=("$1"); }

try parity "$python" -m pytest -q tests/model/test_golden.py tests/model/test_tokenizer.py tests/data/test_views.py --junitxml "$work/parity.xml"
try tokenizer "$python" benchmarks/tokenizer.py --repeats "${REPEATS:-5}" --json "$work/tokenizer.json"
try step "$python" benchmarks/step.py --rounds "${ROUNDS:-3}" --steps 2 --json "$work/step.json"

train=("$python" train/pretrain.py demo --epochs "${EPOCHS:-2}" --overwrite)
try training "${train[@]}" --out "$work/demo"
if [ -f "$work/demo/summary.json" ]; then cp "$work/demo/summary.json" "$work/training.json"; fi
short=("$python" train/pretrain.py demo --epochs 0.5 --report-every 0 --save-every 10 --deterministic)
try whole "${short[@]}" --out "$work/whole"
"${short[@]}" --out "$work/cut" --minutes 0.02 || [ $? -eq 75 ] || failed+=(cut)
try resumed "${short[@]}" --out "$work/cut"
try bits cmp "$work/whole/context.safetensors" "$work/cut/context.safetensors"

"$python" - "$file" "$work" "${failed[@]}" << 'PY'
import json, pathlib, platform, sys, xml.etree.ElementTree as xml
import torch
file, work, *failed = sys.argv[1:]
work = pathlib.Path(work)
machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
found = {"machine": machine, "python": platform.python_version(), "torch": torch.__version__, "failed": failed}
for name in ("tokenizer", "step", "training"):
    path = work / f"{name}.json"
    found[name] = json.loads(path.read_text()) if path.exists() else None
if (work / "parity.xml").exists():
    suite = xml.parse(work / "parity.xml").getroot().find("testsuite")
    found["parity"] = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
found["resumed_to_the_same_bits"] = not {"whole", "cut", "resumed", "bits"} & set(failed)
pathlib.Path(file).write_text(json.dumps(found, indent=1) + "\n")
print(f"{file}: failed: {', '.join(failed) or 'nothing'}")
PY
[ ${#failed[@]} -eq 0 ]
