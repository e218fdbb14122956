"""Tools for LoRA files: inspect, merge, resize, extract, convert. One module each; sd-scripts' formulas."""
