"""`make evidence`: what is claimed of LoRA, measured: a table of claims -> rows (JSON lines) -> docs/evidence.md.

settings: sizes; tasks: rows to learn; plan: which runs are wanted next; learn: the two ways to train; measure: what
a run gives; footprint: sizes, time, memory; rows: the file of finished runs; tables, pictures, render: rows to page.
"""
