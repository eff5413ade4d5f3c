"""Where results and alerts go, beside the reply: each file one kind of receiver."""
