"""`sample:docstrings`: the docstrings of installed packages as a labelled corpus.

Every install has these packages, so every install has real text to train on, without a download.
Sources are parsed, never imported. The labels come from the code around a docstring, not from the
docstring. Which documents are taken depends on the packages' versions, the seed and the number
asked for, and on nothing else; the versions and a fingerprint of the result are recorded.
"""

import json
import os
import sys
from dataclasses import asdict

from trainer.config import SampleConfig
from trainer.sources.docstrings import write_sample
from trainer.storage import filesystem
from trainer.storage.filesystem import disk_errors, write_atomically


def run(config: SampleConfig) -> None:
    """`multihot sample`: writes the corpus, and beside it what it was made of.

    That is `OUTPUT.about`, JSON: documents, seed, the packages' versions, and the SHA-256 of the
    corpus, by which two installations tell whether they have the same. A UserError refuses a URL, a
    folder that cannot be written to, and more documents than the installed packages hold.
    """
    filesystem.require_local("output", config.output)
    with disk_errors(f"--output={config.output}"):
        os.makedirs(os.path.dirname(os.path.abspath(config.output)), exist_ok=True)
        summary = write_sample(
            config.output, config.num_documents, config.seed, progress=config.progress
        )
        write_atomically(config.output + ".about", json.dumps(asdict(summary), indent=2) + "\n")
    print(f"{config.output}: {summary.documents:,} documents, fingerprint {summary.fingerprint}")


if __name__ == "__main__":
    from trainer.cli import main

    main(["sample", *sys.argv[1:]])
