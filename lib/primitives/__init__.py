"""Tensors in, tensors out: the anatomy of models, surgery, calibration, linear algebra, structured and low-rank edits."""
