"""Pack a run's checkpoint for the page on which a DETR runs in the browser, in 8 bits a weight.

    python tools/live_page.py runs/detr/best.pth

After that, run the page again (`make chapter` or tools/chapter.py live), which shows what the packed model finds.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "nbs"))

from book_live import WEIGHTS, pack

from detr_nb.distributed import UserError


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        script = pack(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))
    WEIGHTS.parent.mkdir(exist_ok=True)
    WEIGHTS.write_text(script, encoding="utf-8")
    print(f"nbs/_static/live/weights.js: {len(script) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
