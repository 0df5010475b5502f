"""A page that names what is in an image, with a trained run or an export: Gradio around `mpvg.Predictor`.

pip install '.[app]'
python gradio_app.py RUN

The page is for this machine alone: see docs/inference.md before you show it to others.
"""

import os
import sys

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

import mpvg


def build(source: str) -> gr.Blocks:
    """The page of a run folder or of a folder that `mpvg export` made."""
    predictor = mpvg.Predictor(source)

    def label(file: str | None) -> dict[str, float]:
        """Class -> probability of the five most probable classes."""
        if file is None:
            return {}
        try:
            (found,) = predictor.predict(file)
        except ValueError as error:  # no image, damaged, or too large, which is seen before it is decoded
            raise gr.Error(str(error).replace(file, "")) from error
        return dict(found.classes)

    with gr.Blocks(title="mpvg", analytics_enabled=False, delete_cache=(60, 600)) as page:
        upload = gr.File(label="Image file", file_count="single")  # a path: gr.Image would decode it first
        upload.change(label, upload, gr.Label(label="Most probable classes"), api_name="label")
    return page


LOCAL = {"server_name": "127.0.0.1", "share": False, "mcp_server": False, "max_file_size": "64mb", "run_history": False}

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python gradio_app.py RUN")
    try:
        app = build(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"gradio_app.py: {error}")
    app.launch(theme=gr.themes.Base(font="sans-serif", font_mono="monospace"), **LOCAL)
