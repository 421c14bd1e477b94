"""Passes that write the form which one target runs fastest, and which its kernels take."""
