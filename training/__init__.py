import service  # noqa: F401 - before anything imports ONNX Runtime, whose telemetry it turns off
