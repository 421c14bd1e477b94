"""An application that searches its documents by meaning: no PyTorch, one artifact, many threads.

    onnxpress press DIR_OF_MINILM -o out/minilm
    python examples/embed_in_an_app.py out/minilm
    python examples/embed_in_an_app.py out/minilm "how do I get my money back"

It needs `pip install 'onnxpress[cpu]'` and nothing else.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxpress
from onnxpress.errors import ArtifactError, MissingPackage, OnnxpressError
from onnxpress.runtime import Embedder

DOCUMENTS = [
    "Refunds are paid within ten days, to the card that was used.",
    "Parcels leave our warehouse every weekday at four in the afternoon.",
    "A forgotten password can be reset from the sign-in page.",
    "The battery lasts two days and charges in forty minutes.",
    "We ship to every country of the European Union, and to Switzerland.",
    "Invoices are in your account, under Orders, as PDF files.",
]
QUERIES = ["I want my money back", "can't log in", "do you deliver to Spain?", "how long to charge"]
WORKERS = 8


class Search:
    """Documents embedded once; queries answered by cosine similarity, from any thread."""

    def __init__(self, embedder: Embedder, documents: list[str]) -> None:
        self.embedder, self.documents = embedder, documents
        self.vectors = unit(embedder.embed(documents))

    def best(self, query: str) -> tuple[str, float]:
        """The document nearest to a query, and how near."""
        scores = self.vectors @ unit(self.embedder.embed(query))[0]
        at = int(scores.argmax())
        return self.documents[at], float(scores[at])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1; a model may give others."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def main(arguments: list[str]) -> int:
    """Open the artifact, embed the documents, answer the queries."""
    if not arguments:
        print("usage: python examples/embed_in_an_app.py DIR [QUERY]...", file=sys.stderr)
        return 2
    directory, *queries = arguments
    try:
        # One thread a run: the pool brings the parallelism. For single queries leave it out.
        embedder = onnxpress.load(directory, threads=1)
        if not isinstance(embedder, Embedder):
            print(f"{directory} is no embed artifact: {type(embedder).__name__}", file=sys.stderr)
            return 2
        search = Search(embedder, DOCUMENTS)
        queries = queries or QUERIES
        with ThreadPoolExecutor(WORKERS) as pool:  # a session may be used by all of them at once
            found = pool.map(search.best, queries)
            for query, (document, score) in zip(queries, found, strict=True):
                print(f"{score:.3f}  {query}  ->  {document}")
    except MissingPackage as e:
        print(f"install what is missing: {e.hint}", file=sys.stderr)
        return e.exit_code
    except ArtifactError as e:  # absent, damaged or too new: nothing here can mend it
        print(f"the model is unusable: {e}", file=sys.stderr)
        return e.exit_code
    except OnnxpressError as e:  # everything else that a user can cause: what, where, hint
        print(e, file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
