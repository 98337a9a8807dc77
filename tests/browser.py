"""Headless Chromium, where it is installed: how wide a page becomes, what its console says, and what it looks like."""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# asks the page in each frame how wide it is, and which elements stick out of it that no box of their own scrolls
ASK = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  frame.onload = () => {
    const page = frame.contentDocument, width = page.documentElement.clientWidth, out = [];
    for (const element of page.querySelectorAll("body *")) {
      const box = element.getBoundingClientRect();
      if (box.right > width + 0.5 && !element.closest(".scroll, pre, svg"))
        out.push(element.tagName + "." + element.className + " " + element.textContent.slice(0, 40));
    }
    found.push({width, scroll: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, out});
    document.body.setAttribute("data-found", JSON.stringify(found));
  };
  frame.srcdoc = new TextDecoder().decode(Uint8Array.from(atob(PAGE), c => c.charCodeAt(0)));
}
"""


def look(page: str, folder: Path, *widths: int) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """`page` in frames of `widths` pixels.

    Returns:
        By width: width, scroll (the width that the page would need), height, out (elements beyond the edge). And what
        the console said.
    """
    done = _run("--dump-dom", "--enable-logging=stderr", "--v=0", str(_wrapper(page, folder, 4000, *widths)))
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    frames = {frame["width"]: frame for frame in json.loads(html.unescape(found.group(1)))}
    return frames, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def shoot(page: str, picture: Path, width: int, height: int, *, dark: bool = False) -> None:
    """A screenshot of `page` in a frame of that size."""
    wrapper = _wrapper(page, picture.parent, height, width)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    size = f"--window-size={max(width, 500)},{height}"
    _run(f"--screenshot={picture}", size, scheme, "--hide-scrollbars", str(wrapper))


def _wrapper(page: str, folder: Path, height: int, *widths: int) -> Path:
    path = folder / f"frames-{'-'.join(map(str, widths))}.html"
    style = "border: 0; display: block"
    frames = [f'<iframe style="{style}" width="{w}" height="{height}" scrolling="no"></iframe>' for w in widths]
    script = f"const PAGE = '{base64.b64encode(page.encode()).decode()}';{ASK}"
    path.write_text(f'<body style="margin: 0">{"".join(frames)}<script>{script}</script>', encoding="utf-8")
    return path


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    common = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--no-first-run")
    command = [CHROMIUM, *common, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
