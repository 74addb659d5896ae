"""Write all pages of evidence from the records: `python -m benchmarks`."""

from benchmarks.evidence import write

write()
