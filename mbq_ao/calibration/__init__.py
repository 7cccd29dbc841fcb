"""Calibration: find the scales that a vision-language model can be quantized with. Start reading in mbq.py.

Nothing here is imported when a quantized model is served.
"""
