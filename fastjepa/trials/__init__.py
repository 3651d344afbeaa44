"""What a calibration runs in a child process: candidates, built from sizes, checked against float64 and timed.

`python -m fastjepa.trials REQUEST RESULTS`; `fastjepa.calibration.children` starts it and says what the files hold. It
may import what is measured (the model, `fused`, `graphs`, `moving_mnist` for clips), `policy`, the kernels' checks,
and `calibration` for what a candidate is.
"""
