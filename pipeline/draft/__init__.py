"""The draft engine: a small server that speaks ComfyUI's protocol and draws instead of rendering.

A preview for machines without GPU, ComfyUI or weights, never the model: it runs the production graphs, but
its "model" moves the portrait's head a little and opens its mouth with the loudness of the audio.

    python -m pipeline.draft --listen 127.0.0.1 --port 8188 --base-directory DIR
"""
