"""The page of an executed notebook: its text, code and outputs."""

import base64
import json
import re
from pathlib import Path
from typing import Any


def notebook(path: Path) -> dict[str, str | bytes]:
    """Files of the page: ``NAME.md``, the notebook itself, and the images of its outputs."""
    files: dict[str, str | bytes] = {path.name: path.read_bytes()}
    blocks: list[str] = []
    heading = ""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#+ (.*)", text, re.M) or [heading])[-1]
            blocks.append(text)
            continue
        blocks.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            image = f"{path.stem}-{len(files)}.png"
            data = output.get("data", {})
            if "image/png" in data:
                files[image] = base64.b64decode(data["image/png"])
            blocks.append(_shown(output, f"![{heading}]({image})"))
    blocks.insert(1, f"This page is the notebook [`examples/{path.name}`]({path.name}).")
    return {f"{path.stem}.md": "\n\n".join(blocks) + "\n", **files}


def _shown(output: dict[str, Any], image: str) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return image
    if "text/html" in data:  # a table of pandas, to look like the others of the site
        table = re.search(r"<table.*</table>", "".join(data["text/html"]), re.S)
        return re.sub(r' (border|class|style)="[^"]*"', "", table[0]) if table else ""
    text = output.get("text") or data.get("text/plain", "")
    return f"```text\n{''.join(text).rstrip()}\n```"
