"""A web page for a tuned model: ask about pictures, see the masks behind the words, draw pictures from text.

    python pipeline/demo.py                                       # the mini checkpoint of `make quickstart`
    python pipeline/demo.py --checkpoint runs/7b --port 7860
    python pipeline/demo.py --checkpoint exported/mmud-7b --base /models/Llama-2-7b-hf --clip_weights clip.safetensors

The page listens on this machine alone unless --host says otherwise. It needs gradio: pip install -e .[demo].
"""

from __future__ import annotations

import sys

from pipeline.assembly.demo import make_page
from pipeline.config import DemoArguments, LoadArguments, parse


def main() -> int:
    """Parse, load, serve, close."""
    where, asked = parse(LoadArguments, DemoArguments, description=__doc__)
    page = None
    try:
        page = make_page(where, asked)
        print(f"The page is at {page.serve(asked.host, asked.port, open_browser=asked.open_browser)}", flush=True)
        page.wait()
    except ValueError as error:
        print(f"demo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        if page is not None:
            page.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
