"""Rasterise the emoji packages into `atlas.webp` and `atlas.json`; run by hand, once, by whoever changes the names.

    npm pack @iconify-json/noto @iconify-json/noto-v1 ...      # the six packages named in STYLES
    python -m svlm.calib.demo.build_atlas FOLDER

`FOLDER` holds the packages, as the `.tgz` files that npm downloads or each unpacked in a folder of any name. Needs
`resvg-py`; nothing else in svlm does. The atlas is one lossless RGBA picture: a row a style, a column a name, each
`SIZE` pixels.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
SIZE = 40
STYLES = ("noto", "noto-v1", "fluent-emoji", "twemoji", "fluent-emoji-flat", "fxemoji")
NAMES = """
    airplane ambulance anchor ant balloon banana baseball battery bear bell bicycle blowfish bomb bouquet bowling
    bread briefcase bus cactus calendar camera candy cat chicken chipmunk church cookie cow crocodile crown dolphin
    door doughnut dress elephant envelope factory fish frog ghost goat guitar hamburger hammer handbag headphone
    helicopter honeybee horse key koala lemon lipstick lollipop microphone microscope monkey motorcycle mouse
    mushroom newspaper octopus package peach pear pencil penguin pig pill pineapple printer pushpin radio rainbow
    ring rocket rose sailboat saxophone scroll seedling ship skull snail snake snowflake spaghetti spider star
    strawberry sunflower syringe taxi telescope television tent thermometer tiger toilet tomato tractor train trophy
    trumpet turtle umbrella violin volcano watch watermelon whale wrench
    """.split()  # noqa: SIM905


def read_icons(folder: Path, style: str) -> dict[str, Any]:
    """The `icons.json` of one package, from its folder or from its `.tgz`."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "package.json").exists():
            name = json.loads((path / "package.json").read_text(encoding="utf-8"))["name"]
            if name == f"@iconify-json/{style}":
                return json.loads((path / "icons.json").read_text(encoding="utf-8"))
        elif path.suffix == ".tgz":
            with tarfile.open(path) as archive:
                members = {name: archive.extractfile(f"package/{name}.json") for name in ("package", "icons")}
                if json.load(members["package"])["name"] == f"@iconify-json/{style}":  # type: ignore[arg-type]
                    return json.load(members["icons"])  # type: ignore[arg-type]
    raise SystemExit(f"{folder} has no npm package @iconify-json/{style}")


def svg(icons: dict[str, Any], name: str) -> str:
    """One icon as a whole SVG document; follows aliases."""
    while name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def rasterise(source: str) -> Image.Image:
    """An SVG document as a `SIZE` x `SIZE` RGBA picture: rendered four times as large, then averaged down."""
    from resvg_py import svg_to_bytes

    large = svg_to_bytes(svg_string=source, width=4 * SIZE, height=4 * SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(large))).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.BOX)


def main(folder: Path) -> None:
    """Write the atlas next to this file."""
    sheet = Image.new("RGBA", (SIZE * len(NAMES), SIZE * len(STYLES)))
    for row, style in enumerate(STYLES):
        icons = read_icons(folder, style)
        for column, name in enumerate(NAMES):
            sheet.paste(rasterise(svg(icons, name)), (SIZE * column, SIZE * row))
    sheet.save(HERE / "atlas.webp", lossless=True, quality=100, method=6)
    index = {"size": SIZE, "styles": list(STYLES), "names": NAMES}
    (HERE / "atlas.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
