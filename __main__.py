"""`python -m onnxpress` is the command `onnxpress`."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="onnxpress")
