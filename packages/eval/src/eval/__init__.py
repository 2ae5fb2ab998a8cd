"""Evaluation of image tokenizers and generators, computed from files.

Read in this order: config, media, features, the metrics, and the commands `rfid` and `fid` that use
them.
"""
