"""Image search by example as one HTML page: a click on an image sorts all others by their similarity to it.

python examples/image_search.py runs/photos PHOTOS search.html
"""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from scott_sparse.evaluation.sklearn import ScottFeatures

PAGE = """<!doctype html><meta charset="utf-8"><title>Image search</title>
<style>body { font-family: sans-serif } img { margin: 2px; cursor: pointer; height: 96px }</style>
<p>Click an image; the most similar ones come first.</p><div id="images"></div>
<script>
const images = IMAGES, vectors = VECTORS
const box = document.getElementById("images")
const elements = images.map((picture, i) => {
  const element = document.createElement("img")
  Object.assign(element, {src: picture.src, title: picture.name, onclick: () => sort(i)})
  return element
})
function sort(query) {
  const similarity = vectors.map(vector => vector.reduce((sum, x, d) => sum + x * vectors[query][d], 0))
  const order = elements.map((_, i) => i).sort((i, j) => similarity[j] - similarity[i])
  box.replaceChildren(...order.map(i => elements[i]))
}
box.replaceChildren(...elements)
</script>
"""


def thumbnail(path: Path) -> str:
    buffer = io.BytesIO()
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image.thumbnail((192, 192))
    image.save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(run: str, folder: str, page: str) -> None:
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    features = ScottFeatures(run).fit_transform(paths)
    features -= features.mean(0)  # all images share a large mean, which says nothing of their differences
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    images = [{"name": path.name, "src": thumbnail(path)} for path in paths]
    in_script = json.dumps(images).replace("<", "\\u003c")  # a name may hold a tag
    text = PAGE.replace("VECTORS", json.dumps(features.round(4).tolist())).replace("IMAGES", in_script)
    Path(page).write_text(text, encoding="utf-8")
    print(f"{page}: {len(paths)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
