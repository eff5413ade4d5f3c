import os

# ONNX Runtime's Linux wheels keep telemetry in a database in ~/.cache, with threads that upload it to their maker, from the import on.
# Nothing of a self-hosted service is to leave it; and a process that has threads and an open database cannot be forked safely.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
