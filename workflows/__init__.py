"""The graphs that engines render: API-format JSON for ComfyUI's core nodes, and nothing else.

``pipeline.workflow`` reads them; what the code fills in is named by node titles (``slot: NAME=INPUT``).
"""
