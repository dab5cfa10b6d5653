"""Predictions of a request's output length, as objects of their own: policies that need one take it as a knob.

Written as `predictor=name`, with the predictor's own knobs behind slashes: `predictor=noisy_oracle/error=0.3`.
"""
