"""docs/gallery.jpg and docs/pareto.png: parts of the pages of a sweep, as Chromium shows them.

python docs/pictures.py outputs/demo_sweep
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

SHOWN = "quant.wgts.dtype=sint4,quant.wgts.kernel_gptq={}"  # the run whose gallery is in README.md
OPTIONS = "--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,2400"


def main(sweep: str) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in OPTIONS.split():
        options.add_argument(option)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    parts = {
        "pareto.png": (Path(sweep) / "report.html", ".chart svg"),
        "gallery.jpg": (Path(sweep) / SHOWN / "report.html", ".gallery"),
    }
    for name, (page, selector) in parts.items():
        browser.get(page.absolute().as_uri())
        # the six masks at the top are enough to see what a gallery is
        browser.execute_script("document.querySelectorAll('.shown:nth-child(n + 7)').forEach((one) => one.remove())")
        shot = Image.open(io.BytesIO(browser.find_element("css selector", selector).screenshot_as_png)).convert("RGB")
        if name.endswith(".png"):
            shot.quantize(32).save(Path("docs") / name, optimize=True)
        else:
            shot.save(Path("docs") / name, quality=80, optimize=True)
    browser.quit()


if __name__ == "__main__":
    main(sys.argv[1])
